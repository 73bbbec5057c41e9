"""The exit code of a node, by which its launcher decides how to continue."""

import logging
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import SMALL, environment, read_metrics
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from launch import rendezvous
from launch.node import create_log_folder, report_failure, run_ranks
from launch.node_env import Node


@pytest.fixture(autouse=True)
def _enable_logging():
    """A node silences the logs of torch for the rest of its life."""
    yield
    logging.disable(logging.NOTSET)


def end_with(monkeypatch, error: Exception | None, stop_requested: bool = False) -> int:
    """The exit code of a node whose ranks end so."""

    def elastic_launch(config, executable):
        def run(*words):
            if error is not None:
                raise error

        return run

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    monkeypatch.setattr(rendezvous, "meet", lambda node, timeout: None)
    requests: Any = SimpleNamespace(received=stop_requested, start_ranks=lambda: None)
    return run_ranks(Node(0, 1, "127.0.0.1", "job"), 2, "here", None, ["distrain"], requests)


@pytest.mark.parametrize(
    ("rank", "stop_requested", "node"),
    [
        (75, False, 75),
        (75, True, 75),
        (78, True, 78),
        (1, True, 1),
        (-signal.SIGTERM, True, 75),
        (-signal.SIGUSR1, True, 75),
        (-signal.SIGTERM, False, 1),
        (-signal.SIGKILL, True, 1),
    ],
)
def test_a_node_ends_as_its_rank_that_failed_first(monkeypatch, rank, stop_requested, node):
    failures = {0: ProcessFailure(0, 4711, rank, ""), 1: ProcessFailure(1, 4712, 3, "")}
    failures[0].timestamp, failures[1].timestamp = 1, 2
    assert end_with(monkeypatch, ChildFailedError("distrain", failures), stop_requested) == node


def test_a_node_whose_ranks_end_without_failure_is_done(monkeypatch):
    assert end_with(monkeypatch, None) == 0


def test_a_node_that_cannot_reach_the_others_has_crashed_in_one_line(monkeypatch, capsys):
    assert end_with(monkeypatch, RuntimeError("the client socket\nhas timed out")) == 1
    assert capsys.readouterr().err == "launch: here: the client socket has timed out\n"


def test_a_node_that_can_write_neither_logs_nor_output_trains_to_its_end(on_dataset, small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(small_disk)], check=True)
    short = ("batch.lanes=2", "batch.per_lane=4", "train.epochs=0.2", "evaluate.batch=64")
    words = ["--ranks", "1", "--logs", str(small_disk / "logs"), "--", *SMALL, *on_dataset, *short]
    command = [sys.executable, "-m", "launch", "node", *words, f"run.dir={tmp_path}", "run.name=run"]
    with Path("/dev/full").open("wb") as full:
        assert subprocess.run(command, env=environment(), stdout=full, stderr=full, timeout=600).returncode == 0
    assert read_metrics(tmp_path / "run")[-1]["step"] == 5


def test_a_node_without_room_for_a_log_folder_goes_on_without(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", str(small_disk)], check=True)
    assert create_log_folder(small_disk / "logs") is None
    assert capsys.readouterr().err == f"launch: {small_disk}/logs: no log files are kept: No space left on device\n"


def test_a_failure_that_cannot_be_written_to_a_file_is_printed(small_disk, capsys):
    (small_disk / "filler").write_bytes(bytes(2**21))
    failure = ProcessFailure(0, 4711, -signal.SIGKILL, "")
    report_failure("here", 3, failure, small_disk)
    assert capsys.readouterr().err == "launch: rank 3 on here (pid 4711) ended with signal 9\n"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
