import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import SMALL, digest_on_one_node, environment, read_metrics

# 203 samples in steps of 16: 6 epochs are 76 steps.
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
    surroundings = {**environment(), **variables}
    return subprocess.run(command(*words), capture_output=True, text=True, env=surroundings, timeout=200)


def run_on_nodes(folder: Path, settings, *words: str) -> "subprocess.CompletedProcess[str]":
    return launch("local", "--nodes", "3", "--ranks", "1", f"run.dir={folder}", "run.name=run", *settings, *words)


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory) -> str:
    return digest_on_one_node(tmp_path_factory.mktemp("undisturbed"), *settings, ranks=3)


def test_three_nodes_train_what_one_does_and_start_again_after_crashes(settings, uninterrupted, tmp_path):
    faults = "resilience.faults=[sigkill@train.step:25/1,exception@train.step:45/2]"
    done = run_on_nodes(tmp_path, settings, faults)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().rpartition("weights ")[2] == uninterrupted
    assert "node0:0 step 76/76" in done.stdout

    said = done.stderr.splitlines()
    again = [number for number, line in enumerate(said) if line == "launch: starting again on node0, node1, node2"]
    assert len(again) == 2
    assert said[again[0] - 1].startswith("rank 1 on node1")
    assert said[again[0] - 1].endswith("ended with signal 9")
    # The traceback of the rank that failed first stands last, and as Python writes it.
    assert said[again[1] - 1] == "distrain.resilience.faults.InjectedError: made on purpose"
    assert "Traceback (most recent call last):" in said
    causes = [json.loads(line)["cause"] for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert len(causes) == 3

    first, *_ = sorted((tmp_path / "run" / "logs").iterdir())
    names = {f"node{node}-{node}.{stream}" for node in range(3) for stream in ("out", "err")}
    assert names <= {path.name for path in first.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_everywhere_and_exits_75(settings, uninterrupted, tmp_path, number):
    words = ("local", "--nodes", "3", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment()) as job:
        deadline = time.monotonic() + 60
        while max((entry["step"] for entry in read_metrics(tmp_path / "run")), default=0) < 15:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(number)
        output = job.communicate(timeout=60)[0].decode()
        assert job.returncode == 75, output
        assert "all is saved" in output
    done = run_on_nodes(tmp_path, settings)
    assert done.stdout.strip().rpartition("weights ")[2] == uninterrupted
    attempts = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    assert attempts[-1]["lost_steps"] == 0


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_nothing_running_and_nothing_lost(settings, tmp_path):
    words = ("local", "--nodes", "3", "--ranks", "1", f"run.dir={tmp_path}", "run.name=run", *settings)
    with subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, env=environment()) as job:
        deadline = time.monotonic() + 60
        while max((entry["step"] for entry in read_metrics(tmp_path / "run")), default=0) < 15:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.kill()
    while "stopped by" not in (json.loads((tmp_path / "run" / "attempt.json").read_text())["end"] or ""):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_whose_folder_cannot_be_made_is_told_in_a_line(settings, tmp_path):
    (tmp_path / "run").write_text("")
    done = launch("local", f"run.dir={tmp_path}", "run.name=run", *settings)
    assert done.returncode == 78, done.stdout + done.stderr
    assert "cannot hold the logs: Not a directory; set run.dir elsewhere" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_run_that_never_begins_is_given_up(settings, tmp_path):
    words = ("local", "--ranks", "2", f"run.dir={tmp_path}", "run.name=run", *settings)
    done = launch(*words, GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("Unable to find address for: nosuch0") == 3
    assert done.stderr.endswith("launch: 3 starts in a row ended before training began: giving up\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("local", "--nodes", "0"), "--nodes and --ranks must be at least 1"),
        (("local", "--nodes", "3", "--ranks", "3"), "batch.lanes=4 does not fit 9 ranks"),
        (("local", "batch.lane=4"), "did you mean batch.lanes?"),
        (("ssh",), "no hosts: name them with --hosts a,b or --hostfile FILE"),
        (("ssh", "--hosts", "a,b,a"), "a is named twice among the hosts"),
        (("ssh", "--hostfile", "/nowhere"), "--hostfile /nowhere: No such file or directory"),
        (("ssh", "--hosts", "a,b", "--min-nodes", "3"), "--min-nodes 3 must be from 1 to the 2 hosts there are"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_starts(settings, tmp_path, words, message):
    done = launch(*words, f"run.dir={tmp_path}", "run.name=run", *settings)
    assert done.returncode == 78
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
