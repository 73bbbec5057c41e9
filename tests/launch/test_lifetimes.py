"""What happens to the processes of a job when one of them is killed."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest
from support.processes import SMALL, environment, free_port, read_metrics

# Starts a rank as torchrun does, or as `launch node` does, which says who it is; or by a shell that stays in between.
AGENT = """
import os, subprocess, sys, time
kind, *command = sys.argv[1:]
if kind == "launch":
    os.environ["DISTRAIN_AGENT"] = str(os.getpid())
if kind == "shell":
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
subprocess.Popen(command, start_new_session=True)
time.sleep(60)
"""


class Agent:
    """A process that stands in for torch's agent, which takes seconds to start, and its one rank."""

    def __init__(self, kind: str, arguments: tuple[str, ...], **variables: str) -> None:
        command = [sys.executable, "-c", AGENT, kind, sys.executable, "-m", "distrain", *arguments]
        world = {"TORCHELASTIC_RUN_ID": "job", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env = {**environment(), **world, "MASTER_PORT": str(free_port()), **variables}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.rank = self._find_rank()

    def _find_rank(self) -> psutil.Process:
        """The rank as soon as it exists, even before it executes the interpreter."""
        while True:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if child.cmdline()[:1] != ["sh"]:
                        return child

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def kill_and_see_rank_end(self) -> bool:
        """Whether the rank has ended 2 s after its agent was killed. What adopts it may read its exit code later."""
        self.kill()
        deadline = time.monotonic() + 2
        while is_running(self.rank) and time.monotonic() < deadline:
            time.sleep(0.01)
        return not is_running(self.rank)


@pytest.fixture
def arguments(on_dataset, tmp_path) -> tuple[str, ...]:
    return (*SMALL, *on_dataset, "batch.lanes=2", "train.epochs=1000", f"run.dir={tmp_path}", "run.name=run")


@pytest.fixture
def start(arguments) -> Iterator[Callable[..., Agent]]:
    agents = []

    def begin(kind: str, **variables: str) -> Agent:
        agents.append(Agent(kind, arguments, **variables))
        return agents[-1]

    yield begin
    for agent in agents:
        agent.kill()
        with suppress(psutil.NoSuchProcess):
            agent.rank.kill()


def is_running(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["torchrun", "launch", "shell"])
@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 0.7], ids=str)
def test_a_rank_whose_agent_is_killed_as_it_starts_is_gone_within_2_s(start, kind, seconds):
    agent = start(kind)
    time.sleep(seconds)
    assert agent.kill_and_see_rank_end()


def test_a_rank_whose_agent_is_killed_in_the_rendezvous_is_gone_within_2_s(start):
    port = free_port()
    agent = start("torchrun", WORLD_SIZE="2", MASTER_PORT=str(port))
    with socket.socket() as probe:
        wait_until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
    assert agent.kill_and_see_rank_end()


@pytest.mark.parametrize("kind", ["torchrun", "shell"])
def test_a_rank_whose_agent_is_killed_in_training_is_gone_within_2_s(start, tmp_path, kind):
    agent = start(kind)
    wait_until(lambda: len(read_metrics(tmp_path / "run")) > 3)
    assert agent.kill_and_see_rank_end()
