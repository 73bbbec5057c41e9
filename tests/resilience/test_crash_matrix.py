"""Every kind of fault, in training, validation and checkpointing, on several ranks: the final weights are those of an
uninterrupted run. One run gets all faults one after the other, and its launcher restarts it each time."""

import json

import pytest
from support.processes import SMALL, Training, train

# 203 samples in steps of 12 are 16.9 steps an epoch: 6 epochs are 102 steps, validated at 17, 34, 51, 68, 85 and 102.
SHORT = (
    *SMALL, "batch.lanes=3", "batch.per_lane=4", "train.epochs=6", "checkpoint.every_steps=7", "evaluate.batch=16",
    "resilience.attempts=0", "resilience.patience=4",
)  # fmt: skip
RESTARTING = ("--standalone", "--max-restarts", "30", "--monitor-interval", "0.05")

TRAINING = (
    "sigkill@train.step:5/1", "sigstop@train.step:10", "exception@train.step:16/1", "hang@data.request:20/1",
    "oom@train.step:25", "exit@train.step:30/1", "sigterm@train.step:40/1", "flip@checkpoint.commit:49",
    "sigkill@train.step:51",
)  # fmt: skip
VALIDATION = (
    "sigkill@evaluate.batch:17", "hang@evaluate.batch:34/1", "exception@evaluate.batch:51",
    "sigterm@evaluate.batch:68/1", "exit@evaluate.batch:85/1", "sigstop@evaluate.batch:102/1",
)  # fmt: skip
CHECKPOINTING = (
    "sigkill@checkpoint.stage:7/1", "sigkill@checkpoint.write:14", "exit@checkpoint.manifest:21",
    "sigkill@checkpoint.rename:28", "exception@checkpoint.commit:35/1", "diskfull@checkpoint.write:49/1",
    "ioerror@checkpoint.manifest:56", "sigterm@checkpoint.write:63", "truncate@checkpoint.commit:77",
    "sigkill@train.step:79/1", "exit@checkpoint.commit:84",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    return (*SHORT, *on_dataset)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("ranks", "faults"),
    [(2, TRAINING), (2, VALIDATION), (3, CHECKPOINTING)],
    ids=["training", "validation", "checkpointing"],
)
def test_no_fault_changes_a_bit(settings, tmp_path, ranks, faults):
    expected = train(tmp_path / "uninterrupted", *settings, ranks=ranks)
    assert expected.code == 0, expected.output
    planned = f"resilience.faults=[{','.join(faults)}]"
    training = Training(tmp_path / "run", *settings, planned, ranks=ranks, rendezvous=RESTARTING)
    result = training.wait(timeout=1500)
    assert result.code == 0, result.output
    assert result.digest == expected.digest
    assert result.series("train/loss") == expected.series("train/loss")

    fired = [json.loads(line)["fault"] for line in (result.folder / "faults.jsonl").read_text().splitlines()]
    assert sorted(fired) == sorted(fault if "/" in fault else f"{fault}/0" for fault in faults)
    attempts = [json.loads(line) for line in (result.folder / "attempts.jsonl").read_text().splitlines()]
    assert len(attempts) > len(faults) // 2
    assert max(attempt["lost_steps"] for attempt in attempts) <= 2 * 7  # where the newest checkpoint was damaged
    stopped = [attempt for attempt in attempts if attempt["cause"].startswith("stopped by")]
    assert [attempt["lost_steps"] for attempt in stopped] == [0] * len(stopped)
    assert len(stopped) == sum("sigterm" in fault for fault in faults)


def test_one_non_finite_gradient_skips_its_update_and_several_in_a_row_roll_back(settings, tmp_path):
    one = train(tmp_path / "one", *settings, "resilience.faults=[nan@train.step:9/1]", ranks=2)
    assert one.code == 0, one.output
    assert one.series("train/skipped_updates")[10] == 1

    bad = ",".join(f"nan@train.step:{step}" for step in (24, 25, 26))
    back = train(tmp_path / "back", *settings, "resilience.bad_steps=3", f"resilience.faults=[{bad}]", ranks=2)
    assert back.code == 0, back.output
    assert (
        "3 updates in a row had no finite gradient, up to step 26: "
        "rolling back to step 21 and continuing from there at step 27"
    ) in back.output

    # The same steps skipped without a fault.
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "decisions.json").write_text(json.dumps({"skipped_steps": [[21, 27]]}))
    without = train(tmp_path / "without", *settings, "resilience.bad_steps=3", ranks=2)
    assert without.digest == back.digest
    assert not {22, 23, 24, 25, 26, 27} & without.series("train/loss").keys()


def test_a_run_that_keeps_diverging_ends_with_one_line(settings, tmp_path):
    bad = ",".join(f"nan@train.step:{step}" for step in range(8, 20))
    limits = ("resilience.bad_steps=2", "resilience.rollbacks=2")
    result = train(tmp_path / "run", *settings, *limits, f"resilience.faults=[{bad}]")
    assert result.code == 78, result.output
    assert "distrain: training diverged 3 times, more than resilience.rollbacks=2 allows: 2 updates" in result.output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sigkil@train.step:3", "kind sigkil is not known: did you mean sigkill?"),
        ("sigkill@stepp:3", "failpoint stepp is not known: did you mean train.step?"),
        ("sigkill@train.step", "'sigkill@train.step' is not KIND@FAILPOINT:STEP or KIND@FAILPOINT:STEP/RANK"),
    ],
)
def test_a_misspelled_fault_is_one_line(settings, tmp_path, fault, message):
    refused = train(tmp_path / "run", *settings, f"resilience.faults=[{fault}]")
    assert refused.code == 78
    assert message in refused.output.strip().splitlines()[-1]
