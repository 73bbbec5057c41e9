"""The training of a soak: under torchrun, which restarts it after every fault, and second starts of the same run."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

import psutil

from distrain.errors import UserError
from distrain.lifetime import tied
from distrain.parallel.group import RELIABLE_RESTARTS
from distrain.resilience.claim import newest_attempt

_RESTARTS = 10_000
_EXIT_S = 30.0  # for killed processes to disappear


class Training:
    """A run under torchrun. A context manager that kills it at the end."""

    def __init__(self, arguments: Sequence[str], ranks: int) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(_RESTARTS)]
        options = ["--monitor-interval", "0.05", "--nproc-per-node", str(ranks), "-m", "distrain", *arguments]
        self._errors = TemporaryFile("w+")  # noqa: SIM115, closed with this object
        self._process = subprocess.Popen(
            tied([sys.executable, *torchrun, *options]), stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env={**os.environ, **RELIABLE_RESTARTS},
        )  # fmt: skip
        self._last = ""
        self._reader = threading.Thread(target=self._pass_on, name="output", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def has_ended(self) -> bool:
        """Whether it is trained to its end. Raises UserError if it failed."""
        if self._process.poll() is None:
            return False
        self._reader.join()
        if self._process.returncode or not self._last:
            raise self.failure("training did not finish")
        return True

    def wait(self) -> str:
        """Wait for its end. Returns the digest of the weights. Raises UserError if it failed."""
        self._process.wait()
        assert self.has_ended()
        return self.digest

    @property
    def digest(self) -> str:
        """That of the final weights."""
        return self._last.rpartition("weights ")[2]

    def failure(self, what: str) -> UserError:
        """An error, after printing the end of what the training has written to stderr."""
        self._errors.seek(0)
        print(self._errors.read()[-3000:], file=sys.stderr)
        return UserError(f"soak: {what}; see its last errors above")

    def kill(self) -> None:
        """Kill torchrun and all ranks at once."""
        kill_all([self._process])
        self._reader.join()

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="", flush=True)
            if line.startswith("done: "):
                self._last = line.strip()


class Start:
    """Another start of a run: its ranks without torchrun, whose exit code would hide theirs."""

    def __init__(self, arguments: Sequence[str], ranks: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self._output = TemporaryFile("w+")  # noqa: SIM115, closed with this object
        self._ranks = [
            subprocess.Popen(
                tied([sys.executable, "-m", "distrain", *arguments]), stdout=self._output, stderr=self._output,
                env={**os.environ, **where, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            )
            for rank in range(ranks)
        ]  # fmt: skip

    @property
    def code(self) -> int | None:
        """The exit code of its main rank, if that has ended."""
        return self._ranks[0].poll()

    @property
    def last_line(self) -> str:
        self._output.seek(0)
        return (self._output.read().strip().splitlines() or [""])[-1]

    def kill(self) -> None:
        kill_all(self._ranks)


class Progress:
    """How far a run is, from the files of its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def attempt(self) -> int:
        """The number of the newest attempt, 0 if there is none."""
        newest = newest_attempt(self._folder)
        return newest.number if newest else 0

    @property
    def step(self) -> int:
        """The step that it has reached."""
        with suppress(OSError, ValueError, IndexError):
            return int((self._folder / "beat").read_text().split()[0])
        return 0

    def advances(self, steps: int, seconds: float) -> bool:
        """Wait until one attempt has done `steps` further steps. Returns whether one did within `seconds`."""
        until = time.monotonic() + seconds
        attempt, first = self.attempt, self.step
        while time.monotonic() < until:
            step, current = self.step, self.attempt
            if current != attempt or step < first:
                attempt, first = current, step
            elif step >= first + steps:
                return True
            time.sleep(0.05)
        return False


def kill_all(processes: Sequence["subprocess.Popen[str] | subprocess.Popen[bytes]"]) -> None:
    """Kill processes and all that they have started."""
    doomed: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(process.pid)
            doomed += [found, *found.children(recursive=True)]
    for each in doomed:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    for process in processes:
        process.wait()
    psutil.wait_procs(doomed, timeout=_EXIT_S)
