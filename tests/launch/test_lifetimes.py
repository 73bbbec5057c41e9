"""What happens to the ranks of a job when the process that started them is killed, from their first instruction on."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import psutil
import pytest
from support.forking import FORKING
from support.processes import SMALL, environment, free_port, read_metrics

_MARK = "LIFETIME_TEST"  # an environment variable of the ranks, by which an orphan is found
_SHELL = ("sh", "-c", '"$@"; exit $?', "sh")  # a wrapper that stays between agent and rank


def run_agent(kind: str, variables: dict[str, str], arguments: tuple[str, ...]) -> None:
    """Become torchrun, or the `launch node` that `launch local` starts, with two ranks, or an agent with a wrapper."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.environ.clear()
    os.environ.update(variables)
    if kind == "torchrun":
        from torch.distributed.run import main as torchrun

        torchrun(["--nproc-per-node=2", f"--master-port={free_port()}", "-m", "distrain", *arguments])
    elif kind == "launch":
        from launch.cli import main as launch

        sys.argv = ["launch", "node", "--ranks", "2", "--job", variables[_MARK], "--", *arguments]
        launch()
    else:
        subprocess.Popen([*_SHELL, sys.executable, "-m", "distrain", *arguments], start_new_session=True)
        time.sleep(60)


class Agent:
    """An agent, which forks from a process that has imported torch, and its ranks."""

    def __init__(self, kind: str, arguments: tuple[str, ...]) -> None:
        self._mark = uuid.uuid4().hex
        variables = {**environment(), _MARK: self._mark}
        if kind == "shell":
            world = {"TORCHELASTIC_RUN_ID": "job", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            variables |= {**world, "MASTER_PORT": str(free_port())}
        self._process = FORKING.Process(target=run_agent, args=(kind, variables, arguments))
        self._process.start()
        self._agent = psutil.Process(self._process.pid)

    def started(self) -> list[psutil.Process]:
        """The processes that it has started, even before they execute the interpreter."""
        return self._agent.children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """The interpreters among them."""
        found = []
        for child in self.started():
            with suppress(psutil.Error):
                if child.environ().get(_MARK) == self._mark and child.cmdline()[0] != "sh":
                    found.append(child)
        return found

    def kill(self) -> list[psutil.Process]:
        """Kill the agent. Returns what it has started."""
        self._agent.suspend()
        started = self.started()
        self._process.kill()
        self._process.join()
        return started

    def clean_up(self) -> None:
        self._process.kill()
        self._process.join()
        for process in self.left():
            process.kill()

    def left(self) -> list[psutil.Process]:
        """Running processes of all that have its mark."""
        left = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and not is_gone(process):
                    left.append(process)
        return left


def is_gone(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture
def start(on_dataset, tmp_path) -> Iterator[Callable[[str], Agent]]:
    agents = []
    arguments = (*SMALL, *on_dataset, "batch.lanes=2", "train.epochs=1000", f"run.dir={tmp_path}", "run.name=run")

    def begin(kind: str) -> Agent:
        agents.append(Agent(kind, arguments))
        return agents[-1]

    yield begin
    for agent in agents:
        agent.clean_up()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_importing(rank: psutil.Process) -> bool:
    with suppress(OSError):
        return "libtorch_cpu" in Path(f"/proc/{rank.pid}/maps").read_text()
    return False


def wait_for(moment: str, agent: Agent, run: Path) -> None:
    """Wait until an agent's ranks are at a moment of their start; a number is seconds since the first one was there."""
    wait_until(agent.started)
    if moment.replace(".", "").isdigit():
        time.sleep(float(moment))
        return
    wait_until(lambda: any(map(is_importing, agent.ranks())))
    if moment == "rendezvous":
        first, *others = agent.ranks()
        for other in others:  # the first one waits for it
            other.suspend()
        wait_until(first.net_connections)
    if moment == "training":
        wait_until(lambda: len(read_metrics(run)) > 3)


@pytest.mark.parametrize(
    ("kind", "moment"),
    [
        *product(["torchrun", "launch"], ["0", "0.05", "0.2", "import", "rendezvous", "training"]),
        *product(["shell"], ["0.05", "import"]),
    ],
)
def test_no_rank_outlives_its_agent_whenever_that_is_killed(start, tmp_path, kind, moment):
    agent = start(kind)
    wait_for(moment, agent, tmp_path / "run")
    started = agent.kill()
    wait_until(lambda: all(map(is_gone, started)) and not agent.left())
