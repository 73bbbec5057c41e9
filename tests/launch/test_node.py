"""The exit code of a node, by which its launcher decides how to continue."""

import logging
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from launch import rendezvous
from launch.node import run_ranks
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
