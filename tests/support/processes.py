"""Real training processes: forked, which starts them quickly, or started the way a user starts them."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from distrain.parallel.group import RELIABLE_RESTARTS
from support.forking import Ranks, kill_at_once

# A network of 14 layers that trains at hundreds of steps per second on 8-pixel images.
SMALL = (
    "model.name=densenet_bc_10_4",
    "train.precision=fp32",
    "train.memory_format=channels_last",
    "train.dense_block=plain",
    "data.loader=torch",
    "data.threads=1",
    "optimizer.lr=0.05",
    "schedule.warmup_epochs=0",
    "track.uri=none",
    "track.every_steps=1",
)

README = Path(__file__).parents[2] / "README.md"


@dataclass
class Result:
    """How a training command ended."""

    code: int
    output: str
    folder: Path

    @property
    def lines(self) -> list[str]:
        """Lines that distrain reported, without the rank."""
        reported = [line for line in self.output.splitlines() if line.startswith("distrain: ")]
        return [re.sub(r"^distrain: (rank \d+: )?", "", line) for line in reported]

    @property
    def last_line(self) -> str:
        """The line with the final accuracy and digest."""
        done = [line for line in self.output.splitlines() if line.startswith("done: ")]
        assert done, self.output
        return done[-1]

    @property
    def digest(self) -> str:
        """The digest of the final weights."""
        return self.last_line.rpartition("weights ")[2]

    @property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder)

    def series(self, name: str) -> dict[int, float]:
        """A metric by step."""
        return {entry["step"]: entry["metrics"][name] for entry in self.metrics if name in entry["metrics"]}


class Training:
    """A running training command: `ranks` processes that fork, or, with any of the options, that start as a user starts
    them, under torchrun or as one process."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        ranks: int = 1,
        fresh: bool = False,
        rendezvous: tuple[str, ...] = ("--standalone",),
        program: tuple[str, ...] = ("-m", "distrain"),
        host: tuple[str, ...] = (),
        prepare: Callable[[], object] | None = None,
    ):
        """`fresh` starts new interpreters. `host` is a command prefix, such as one that runs the rest of the command in
        another namespace. Ranks that fork call `prepare` before they start."""
        standalone = rendezvous == ("--standalone",)
        fork = standalone and program == ("-m", "distrain") and not (host or fresh or torch.cuda.is_available())
        arguments = [f"run.name={folder.name}", f"run.dir={folder.parent}", *overrides]
        self.folder = folder
        self._log = folder.with_suffix(".log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.process: Ranks | subprocess.Popen[bytes]
        with self._log.open("a") as log:
            self._began = log.tell()
            if fork:
                self.process = Ranks(arguments, environment(), ranks, free_port(), self._log, prepare)
                return
            torchrun = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks)]
            start = [sys.executable] if ranks == 1 and standalone else [sys.executable, *torchrun]
            self.process = subprocess.Popen(
                [*host, *start, *program, *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment()
            )

    def wait(self, timeout: float = 400) -> Result:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output}") from None
        return Result(code, self.output, self.folder)

    def wait_for_step(self, step: int, timeout: float = 300) -> None:
        """Return once this or an earlier start has reported this step or a later one."""
        deadline = time.monotonic() + timeout
        while True:
            reported = [entry["step"] for entry in read_metrics(self.folder)]
            if reported and max(reported) >= step:
                return
            assert self.process.poll() is None, f"exited before step {step}:\n{self.output}"
            assert time.monotonic() < deadline, f"step {step} not reached:\n{self.output}"
            time.sleep(0.002)

    def workers(self) -> list[psutil.Process]:
        """The ranks, and other children of torchrun."""
        if isinstance(self.process, Ranks):
            return [psutil.Process(pid) for pid in self.process.pids if psutil.pid_exists(pid)]
        started = psutil.Process(self.process.pid)
        return started.children(recursive=True) or [started]

    def kill(self) -> None:
        """Send SIGKILL to the launcher and all ranks at once, as if the machine lost power."""
        if isinstance(self.process, Ranks):
            self.process.kill()
            return
        doomed = list({psutil.Process(self.process.pid), *self.workers()})
        kill_at_once(doomed)
        self.process.wait()
        psutil.wait_procs(doomed, timeout=10)

    def signal_workers(self, number: signal.Signals) -> None:
        for process in self.workers():
            process.send_signal(number)

    @property
    def output(self) -> str:
        with self._log.open() as log:
            log.seek(self._began)
            return log.read()


def train(folder: Path, *overrides: str, ranks: int = 1, **options) -> Result:
    """Train to the end."""
    return Training(folder, *overrides, ranks=ranks, **options).wait()


def free_port() -> int:
    """A port of this machine that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_agents() -> tuple[str, ...]:
    """Options of torchrun for two agents that rendezvous on this machine."""
    endpoint = f"127.0.0.1:{free_port()}"
    return ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test")


def environment() -> dict[str, str]:
    """A user's environment, with one compute thread per process and without the developer's tracking server."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": "", **RELIABLE_RESTARTS}


def read_metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def readme_command(beginning: str) -> list[str]:
    """The words of the only command in README that starts with `beginning`, including its continuation lines."""
    (found,) = re.findall(rf"^ +({re.escape(beginning)}(?:.*\\\n)*.*)$", README.read_text(), re.MULTILINE)
    return shlex.split(found.replace("\\\n", " "))


def digest_on_one_node(folder: Path, *arguments: str, ranks: int) -> str:
    """The final weights digest of a run of `python -m launch local`, with one thread per rank."""
    command = [sys.executable, "-m", "launch", "local", "--ranks", str(ranks), *arguments, f"run.dir={folder}"]
    done = subprocess.run(
        [*command, "run.name=run"], cwd=README.parent, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().rpartition("weights ")[2]


def evaluate(folder: Path, *arguments: object, ranks: int = 1) -> tuple[int, str]:
    """Run `distrain evaluate` on forked ranks. Returns its exit code and output."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    words = ["evaluate", *map(str, arguments), "--out", str(folder)]
    return Ranks(words, environment(), ranks, free_port(), log, None).wait(120), log.read_text()
