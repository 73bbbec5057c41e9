"""Attempts of a run: recorded, counted, fenced, watched."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial

import psutil
import pytest
from support.counting import freeze_before_the_attempt, place_on_nodes
from support.processes import Training, read_metrics, train

from distrain.checkpoint import newest_step
from distrain.processes import process_ticks
from distrain.resilience.claim import newest_attempt
from distrain.resilience.heartbeats import Heartbeat
from distrain.resilience.messages import NodeMessages
from distrain.resilience.watchdog import Watchdog


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "uninterrupted", *settings, ranks=2)


def attempts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


def test_a_restart_is_recorded_with_its_cost(settings, tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, *settings)
    training.wait_for_step(12)
    training.kill()
    reached = int((folder / "beat").read_text().split()[0])
    saved = newest_step(folder / "checkpoints")
    assert train(folder, *settings).code == 0
    first, second = attempts(folder)
    assert (first["attempt"], first["cause"], first["from_step"], first["lost_steps"]) == (1, "", 0, 0)
    assert (second["attempt"], second["from_step"], second["lost_steps"]) == (2, saved, reached - saved)
    assert second["cause"].startswith("exited without reporting")
    assert all(second["seconds"][phase] > 0 for phase in ("down", "join", "load", "first_step"))
    assert newest_attempt(folder).end == "done"


def test_after_three_attempts_in_a_row_without_a_checkpoint_the_run_refuses_to_start(settings, tmp_path):
    folder = tmp_path / "run"
    for _ in range(3):
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        training = Training(folder, *settings, "checkpoint.every_steps=1000", "evaluate.every_epochs=3")
        training.wait_for_step(3)
        training.kill()
    refused = train(folder, *settings)
    assert refused.code == 78
    assert refused.output.strip().splitlines()[-1] == (
        f"distrain: {folder}/attempts: 3 attempts in a row ended without a checkpoint after step 0: "
        "fix the cause, which their logs show, delete that folder, and run again"
    )
    shutil.rmtree(folder / "attempts")
    assert train(folder, *settings).code == 0


def test_a_superseded_attempt_commits_nothing_more(settings, tmp_path):
    folder = tmp_path / "run"
    training = Training(folder, *settings)
    training.wait_for_step(8)
    current = asdict(newest_attempt(folder))
    (folder / "attempts" / "00000002.json").write_text(json.dumps({**current, "number": 2, "host": "elsewhere"}))
    before = newest_step(folder / "checkpoints")
    stale = training.wait()
    assert stale.code == 1
    assert "attempt 2 on elsewhere has taken over" in stale.output
    assert newest_step(folder / "checkpoints") <= before + 7
    assert newest_step(folder / "checkpoints") < 51
    assert newest_attempt(folder).end is None


@pytest.mark.parametrize("frozen", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_frozen_rank_is_named_and_the_attempt_ends(uninterrupted, settings, tmp_path, frozen):
    folder = tmp_path / "run"
    training = Training(folder, *settings, "resilience.patience=3", ranks=2)
    training.wait_for_step(9)
    training.workers()[frozen].suspend()
    ended = training.wait()
    assert ended.code != 0
    assert f"distrain: rank {frozen} on " in ended.output
    assert "made no progress for 3 s" in ended.output
    stacks = [path.read_text() for path in (folder / "stacks").iterdir()]
    assert any("train_step" in text for text in stacks)
    assert train(folder, *settings, ranks=2).digest == uninterrupted.digest


def test_a_rank_that_freezes_before_the_attempt_begins_is_named(settings, tmp_path):
    frozen = partial(freeze_before_the_attempt, 1)
    ended = train(tmp_path / "run", *settings, "resilience.patience=2", ranks=2, prepare=frozen)
    assert ended.code != 0
    assert "distrain: rank 1 on " in ended.output
    assert "made no progress for 2 s, in phase start of step 0" in ended.output
    assert not (tmp_path / "run" / "attempts").exists()


def test_a_frozen_node_is_named_by_the_next_one_and_a_suspended_job_is_not(settings, tmp_path):
    training = Training(
        tmp_path / "run",
        *settings,
        "train.epochs=1000",
        "resilience.patience=2",
        ranks=2,
        prepare=partial(place_on_nodes, 1),
    )
    training.wait_for_step(9)
    first, second = training.workers()
    for process in (second, first):
        process.suspend()
    time.sleep(3)
    for process in (first, second):
        process.resume()
    training.wait_for_step(1 + max(entry["step"] for entry in read_metrics(training.folder)))
    second.suspend()
    first.wait(timeout=240)
    second.kill()
    ended = training.wait()
    assert [line.partition(" (process")[0] for line in ended.lines] == [f"rank 1 on {socket.gethostname()}"]
    assert "made no progress for 2 s, in phase step-or-validation of step" in ended.output
    assert "train_step" in "".join(path.read_text() for path in (tmp_path / "run" / "stacks").iterdir())


def test_messages_of_other_programs_are_no_sign_of_life_and_no_alarm(group, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    here, foreign = NodeMessages(group), NodeMessages(group)  # one node, so that each is its own next one
    foreign._addresses = [here._before]
    foreign.send_alarm("go away")
    assert here.receive(0.2) == ""
    assert here.received is None
    beat = Heartbeat(5, "restore", 3)
    here.send_heartbeat(1, beat)
    assert here.receive(0.2) == ""
    assert here.received == (1, beat)
    here.send_alarm("rank 3 hangs")
    assert here.receive(10) == "rank 3 hangs"


@pytest.fixture
def ending(group, tmp_path, monkeypatch):
    """Ends the attempt as the watchdog does, and kills the process of a frozen rank, of which all is known but when it
    was created: `late` clock ticks after its true time."""

    def end(process: subprocess.Popen, late: int) -> None:
        ticks = process_ticks(process.pid)
        assert ticks is not None
        monkeypatch.setattr(group, "peers", [replace(group.peers[0], pid=process.pid, ticks=ticks - late)])
        monkeypatch.setattr("os._exit", sys.exit)
        with pytest.raises(SystemExit, match=r"^1$"):
            Watchdog(group, tmp_path, 1.0)._end("rank 0 hangs", kill=0)

    return end


@pytest.mark.parametrize("late", [0, 1])
def test_a_frozen_process_is_killed_and_another_with_its_number_is_not(ending, late):
    with subprocess.Popen(["sleep", "60"]) as process:
        ending(process, late)
        assert process.poll() is None or not late
        process.send_signal(signal.SIGTERM if late else signal.SIGCONT)
    assert process.returncode == -(signal.SIGTERM if late else signal.SIGKILL)


def test_a_file_system_that_hangs_does_not_keep_a_hung_rank_alive(ending, tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.resilience.watchdog._STACKS_S", 0.1)
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / f"rank-0-{os.getpid()}.txt")  # opening it waits for a reader
    with subprocess.Popen(["sleep", "60"]) as process:
        ending(process, 0)
    assert process.returncode == -signal.SIGKILL
    (tmp_path / "stacks" / f"rank-0-{os.getpid()}.txt").open().close()


def test_the_survivor_of_a_killed_rank_prints_nothing_because_torchrun_reports_the_cause(settings, tmp_path):
    died = train(tmp_path / "run", *settings, "resilience.faults=[sigkill@train.step:9/1]", ranks=2, fresh=True)
    assert died.code == 1
    assert "Signal 9 (SIGKILL)" in died.output
    assert "distrain:" not in died.output


def test_workers_die_with_their_launcher(settings, tmp_path):
    training = Training(tmp_path / "run", *settings, "train.epochs=1000", ranks=2, fresh=True)
    training.wait_for_step(5)
    workers = training.workers()
    assert len(workers) >= 2
    training.process.send_signal(signal.SIGKILL)
    training.process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_a_weight_that_differs_between_ranks_is_found_and_never_saved(uninterrupted, settings, tmp_path):
    found = train(tmp_path / "run", *settings, "resilience.faults=[memory@train.step:9/1]", ranks=2)
    assert found.code == 1
    assert "rank 1 on" in found.lines[0]
    assert "has another " in found.lines[0]
    assert "at step 14, which a fault of its memory may cause" in found.lines[0]
    assert train(tmp_path / "run", *settings, ranks=2).digest == uninterrupted.digest
