import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from support.processes import SMALL, digest_on_one_node, environment, read_metrics

from distrain.processes import machine_id, process_ticks
from distrain.resilience.claim import AttemptRecord, newest_attempt

# 6 epochs of 203 samples, 16 per step, are 76 steps.
SETTINGS = (
    *SMALL, "batch.lanes=4", "batch.per_lane=4", "train.epochs=6", "checkpoint.every_steps=10", "resilience.patience=6",
    "evaluate.every_epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    return (*SETTINGS, *on_dataset)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch", *words]


def launch(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    env = {**environment(), **variables}
    return subprocess.run(command(*words), capture_output=True, text=True, env=env, timeout=600)


def run_on_nodes(folder: Path, settings, *words: str) -> "subprocess.CompletedProcess[str]":
    return launch("local", "--nodes", "3", "--ranks", "1", f"run.dir={folder}", "run.name=run", *settings, *words)


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> str:
    return digest_on_one_node(tmp_path_factory.mktemp("uninterrupted"), *settings, ranks=3)


@pytest.mark.slow
def test_three_nodes_end_in_the_weights_of_one_and_restart_after_crashes(settings, uninterrupted, tmp_path):
    faults = "resilience.faults=[sigkill@train.step:25/1,exception@train.step:45/2]"
    done = run_on_nodes(tmp_path, settings, faults)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().rpartition("weights ")[2] == uninterrupted
    assert "node0:0 step 76/76" in done.stdout

    lines = done.stderr.splitlines()
    restarts = [number for number, line in enumerate(lines) if line == "launch: starting again on node0, node1, node2"]
    assert len(restarts) == 2
    assert lines[restarts[0] - 1].startswith("rank 1 on node1")
    assert lines[restarts[0] - 1].endswith("ended with signal 9")
    # The traceback of the rank that failed first is the last output before the restart, as Python prints it.
    assert lines[restarts[1] - 1] == "distrain.resilience.faults.InjectedError: injected"
    assert "Traceback (most recent call last):" in lines
    causes = [json.loads(line)["cause"] for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert len(causes) == 3

    first, *_ = sorted((tmp_path / "run" / "logs").iterdir())
    names = {f"node{node}-{node}.{stream}" for node in range(3) for stream in ("out", "err")}
    assert names <= {path.name for path in first.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_on_all_nodes_and_exits_75(settings, uninterrupted, tmp_path, number):
    words = ("local", "--nodes", "3", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()) as job:
        deadline = time.monotonic() + 400
        while max((entry["step"] for entry in read_metrics(tmp_path / "run")), default=0) < 15:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(number)
        output = job.communicate(timeout=240)[0].decode()
        assert job.returncode == 75, output
        assert "everything is saved" in output
    done = run_on_nodes(tmp_path, settings)
    assert done.stdout.strip().rpartition("weights ")[2] == uninterrupted
    attempts = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert attempts[-1]["lost_steps"] == 0


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_process_running_and_loses_no_work(settings, tmp_path):
    words = ("local", "--nodes", "3", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, env=environment()) as job:
        deadline = time.monotonic() + 400
        while max((entry["step"] for entry in read_metrics(tmp_path / "run")), default=0) < 15:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.kill()
    while "stopped by" not in (newest_attempt(tmp_path / "run").end or ""):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_folder_that_cannot_be_created_is_reported_in_one_line(settings, tmp_path):
    (tmp_path / "run").write_text("")
    done = launch("local", f"run.dir={tmp_path}", "run.name=run", *settings)
    assert done.returncode == 78, done.stdout + done.stderr
    assert "cannot create the log folder: Not a directory; set run.dir elsewhere" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_mistake_that_ranks_on_two_nodes_find_prints_its_line_once(settings, tmp_path):
    words = ("local", "--nodes", "2", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    missing = launch(*words, "data.train=/nowhere.parquet")
    assert missing.returncode == 78
    assert (missing.stdout + missing.stderr).count("/nowhere.parquet: index not found") == 1


def test_a_second_start_on_two_nodes_is_refused_in_one_line(settings, tmp_path):
    words = ("local", "--nodes", "2", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    (attempts := tmp_path / "run" / "attempts").mkdir(parents=True)
    this = AttemptRecord(1, host="here", machine=machine_id(), pid=os.getpid(), started=process_ticks(os.getpid()))
    (attempts / "00000001.json").write_text(json.dumps(asdict(this)))
    second = launch(*words)
    assert second.returncode == 78
    assert (second.stdout + second.stderr).count(f"attempt 1 of this run is alive, as process {os.getpid()}") == 1


@pytest.mark.slow
def test_a_run_that_never_begins_training_is_given_up(settings, tmp_path):
    words = ("local", "--ranks", "2", f"run.dir={tmp_path}", "run.name=run", *settings)
    done = launch(*words, GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("Unable to find address for: nosuch0") == 3
    assert done.stderr.endswith("launch: giving up: 3 starts in a row crashed before training began\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("local", "--nodes", "0"), "--nodes and --ranks must be at least 1"),
        (("local", "batch.lanes=4", "--nodes", "0"), "--nodes and --ranks must be at least 1"),
        (("local", "--nodes", "3", "--ranks", "3"), "batch.lanes=4 does not fit 9 ranks"),
        (("local", "batch.lane=4"), "did you mean batch.lanes?"),
        (("ssh",), "no hosts: set --hosts a,b or --hostfile FILE"),
        (("ssh", "--hosts", "a,b,a"), "duplicate hosts: a"),
        (("ssh", "--hostfile", "/nowhere"), "--hostfile /nowhere: No such file or directory"),
        (("ssh", "--hosts", "a,b", "--min-nodes", "3"), "--min-nodes 3 must be between 1 and the number of hosts, 2"),
    ],
)
def test_mistakes_are_reported_in_one_line_before_anything_starts(settings, tmp_path, words, message):
    done = launch(*words, f"run.dir={tmp_path}", "run.name=run", *settings)
    assert done.returncode == 78
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
