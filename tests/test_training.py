"""Whole runs: on several numbers of ranks, interrupted, refused."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support import recording
from support.processes import Training, train, two_agents
from support.recording import record_samples

from distrain.checkpoint import MANIFEST, committed, read


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> dict:
    """The same run on 1, 2 and 3 ranks, each of which records the samples it consumes; on 2 as a user starts it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    results = {ranks: train(folder / f"on{ranks}", *settings, ranks=ranks, prepare=record_samples) for ranks in (1, 3)}
    results[2] = train(folder / "on2", *settings, ranks=2, program=(str(recording.__file__),))
    assert [result.code for result in results.values()] == [0, 0, 0], results
    return results


def newest(folder: Path) -> Path:
    return committed(folder / "checkpoints")[-1]


def test_the_last_line_states_accuracy_images_and_digest(uninterrupted):
    last = uninterrupted[1].output.strip().splitlines()[-1]
    assert last.startswith("done: top-1 ")
    assert "of 61 images  weights sha256:" in last


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_do_not_depend_on_the_number_of_ranks(uninterrupted, ranks):
    one, several = (uninterrupted[n].series("train/loss") for n in (1, ranks))
    assert list(one) == list(range(1, 52))
    np.testing.assert_allclose(list(several.values()), list(one.values()), rtol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_running_statistics_do_not_depend_on_the_number_of_ranks(uninterrupted, ranks):
    one, several = (read(newest(uninterrupted[n].folder)).tensors for n in (1, ranks))
    statistics = [name for name in one if "running_" in name or "num_batches" in name]
    assert len(statistics) > 10
    for name in statistics:
        torch.testing.assert_close(several[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_is_trained_on_once_per_epoch(uninterrupted, ranks):
    seen = [
        json.loads(line)
        for record in uninterrupted[ranks].folder.glob("consumed-*.jsonl")
        for line in record.read_text().splitlines()
    ]
    for epoch in (0, 1, 2):
        assert sorted(sample for e, sample in seen if e == epoch) == list(range(203))
    assert len(seen) == 51 * 12  # three of them belong to the next epoch


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_several_steps_the_run_ends_in_the_same_bits(uninterrupted, settings, tmp_path, ranks):
    folder = tmp_path / "killed"
    for step in (10, 23, 38):
        training = Training(folder, *settings, ranks=ranks)
        training.wait_for_step(step)
        training.kill()
    result = train(folder, *settings, ranks=ranks)
    assert result.code == 0, result.output
    assert "resuming at step" in result.output
    assert result.digest == uninterrupted[ranks].digest
    assert result.series("train/loss") == uninterrupted[ranks].series("train/loss")
    assert len(result.series("train/loss")) == len([m for m in result.metrics if "train/loss" in m["metrics"]])


def test_sigterm_saves_and_exits_75_and_the_run_resumes_later(uninterrupted, settings, tmp_path):
    folder = tmp_path / "stopped"
    training = Training(folder, *settings, "checkpoint.every_steps=1000")
    training.wait_for_step(10)
    training.signal_workers(signal.SIGTERM)
    stopped = training.wait()
    assert stopped.code == 75, stopped.output
    assert "stopped by SIGTERM; everything is saved" in stopped.output
    saved = json.loads((newest(folder) / MANIFEST).read_text())["step"]
    assert saved == max(stopped.series("train/loss"))
    assert train(folder, *settings).digest == uninterrupted[1].digest


def test_a_stop_file_stops_all_ranks_at_the_same_step(uninterrupted, settings, tmp_path):
    folder = tmp_path / "stopped"
    training = Training(folder, *settings, ranks=2)
    training.wait_for_step(10)
    (folder / "stop").touch()
    stopped = training.wait()
    assert "; everything is saved, run the same command again to continue" in stopped.output
    assert not (folder / "stop").exists()
    assert train(folder, *settings, ranks=2).digest == uninterrupted[2].digest


def test_with_a_flipped_bit_in_the_newest_checkpoint_the_one_before_is_used(uninterrupted, settings, tmp_path):
    folder = tmp_path / "damaged"
    training = Training(folder, *settings, ranks=2)
    training.wait_for_step(30)
    training.kill()
    before, damaged = committed(folder / "checkpoints")[-2:]
    data = sorted(damaged.glob("*.distcp"))[0]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)

    result = train(folder, *settings, ranks=2)
    assert f"{damaged.name} is damaged: {data.name}" in result.output
    assert f"resuming at step {int(before.name[-8:])} of 51" in result.output
    assert result.digest == uninterrupted[2].digest
    assert data.name in (damaged.with_name(damaged.name + ".bad") / "reason.txt").read_text()


def test_two_agents_that_rendezvous_over_the_network_train_as_one_does(uninterrupted, settings, tmp_path):
    rendezvous = two_agents()
    first = Training(tmp_path / "run", *settings, rendezvous=rendezvous)
    second = Training(tmp_path / "run", *settings, rendezvous=rendezvous)
    results = [agent.wait() for agent in (first, second)]
    assert [result.code for result in results] == [0, 0], results[0].output
    assert results[0].digest == uninterrupted[2].digest


def test_a_finished_run_started_again_reports_the_same_result(uninterrupted, settings):
    again = train(uninterrupted[1].folder, *settings)
    assert again.code == 0
    assert again.output.strip().splitlines()[-1] == uninterrupted[1].output.strip().splitlines()[-1]


def test_a_run_refuses_to_resume_with_other_settings(uninterrupted, settings):
    refused = train(uninterrupted[1].folder, *settings, "optimizer.lr=0.06")
    assert refused.code == 78
    assert refused.output.strip() == (
        "distrain: optimizer.lr was 0.05 when this run began and is 0.06 now: "
        "set it back, name it in run.change=[optimizer.lr] if the change is intended, "
        "or start a new run with another run.name"
    )


def test_more_ranks_than_lanes_is_refused_in_one_line(settings, tmp_path):
    refused = train(tmp_path / "wide", *settings, "batch.lanes=1", ranks=2, fresh=True)
    errors = [line for line in refused.output.splitlines() if line.startswith("distrain:")]
    assert errors == [
        "distrain: batch.lanes=1 does not fit 2 ranks: every rank needs at least one lane; "
        "start at most 1, or set batch.lanes=2 (a new run)"
    ]
    assert not (tmp_path / "wide").exists()
    assert "exitcode  : 78" in refused.output


def test_the_wrong_number_of_classes_is_refused_in_one_line(settings, tmp_path):
    refused = train(tmp_path / "classes", *settings, "model.num_classes=10")
    assert refused.code == 78
    assert refused.output.strip().endswith("has 3 classes: set model.num_classes=3")
    assert len(refused.output.strip().splitlines()) == 1
