"""Hang detection: a rank without progress is named, every rank dumps its stacks, and the attempt ends.

Each rank has a thread that writes the rank's heartbeat to a file in the run's folder and watches its own rank and the
next one: a stuck rank still has a running thread to report it, and a frozen process has a neighbor. Files, because any
other shared store is served by one of the ranks, and that may be the hung one.
"""

import faulthandler
import os
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

from distrain.parallel.group import Group

_BEAT_BYTES = 512
_ALARM_S = 1.0  # for the other ranks to see an alarm


class Heartbeat(NamedTuple):
    """The progress of a rank; `beats` rises with every sign of progress and is -1 once the rank is done."""

    beats: int
    phase: str
    step: int
    host: str
    pid: int
    started: float
    """When the process was created, seconds since 1970: process ids are reused."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError for an incomplete one."""
        beats, phase, step, host, pid, started = text.split()
        return cls(int(beats), phase, int(step), host, int(pid), float(started))


class Watchdog:
    """Ends this process, and with it the attempt, if any rank makes no progress for `patience` seconds.

    A context manager that owns the thread. A patience of 0 disables it.
    """

    def __init__(self, group: Group, run_folder: Path, patience: float) -> None:
        self._group = group
        self._stacks = run_folder / "stacks"
        self._heartbeats = run_folder / "watch"
        self._patience = patience
        self._beat = Heartbeat(0, "start", 0, socket.gethostname(), os.getpid(), psutil.Process().create_time())
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._patience:
            # A folder of its own for this attempt, so that ranks of an earlier one are not mistaken for its ranks.
            self._folder = self._heartbeats / self._group.broadcast(f"{time.time():.3f}")
            if self._group.is_main:
                shutil.rmtree(self._heartbeats, ignore_errors=True)
                self._folder.mkdir(parents=True, exist_ok=True)
            self._group.barrier()
            self._file = os.open(self._folder / f"rank-{self._group.rank}", os.O_WRONLY | os.O_CREAT, 0o644)
            self._write_beat()
            self._thread = threading.Thread(target=self._watch_ranks, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beat = self._beat._replace(beats=-1)
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            with suppress(OSError):
                os.close(self._file)

    def heartbeat(self, phase: str, step: int) -> None:
        """Record that this rank makes progress, and where it is."""
        self._beat = self._beat._replace(beats=self._beat.beats + 1, phase=phase, step=step)

    def _watch_ranks(self) -> None:
        neighbor = (self._group.rank + 1) % self._group.world  # itself in a world of one
        seen: dict[int, tuple[float, float]] = {}  # by rank: its last heartbeat, and when that was first seen
        over = False
        while not over:
            over = self._done.wait(min(max(self._patience / 20, 0.1), 10.0))
            with suppress(OSError):  # a folder that is temporarily unavailable is not a reason to exit
                self._write_beat()
            with suppress(OSError, ValueError):
                if (self._folder / "alarm").exists() and not over:
                    self._end((self._folder / "alarm").read_text())
                # A frozen neighbor first: a rank that waits for it makes no progress either, and has more patience.
                for rank, patience in ((neighbor, self._patience), (self._group.rank, 1.25 * self._patience)):
                    is_own = rank == self._group.rank
                    beat, sign = (self._beat, float(self._beat.beats)) if is_own else self._read_beat(rank)
                    now = time.monotonic()
                    if beat is None or beat.beats == -1:
                        continue
                    if rank not in seen or seen[rank][0] != sign:
                        seen[rank] = sign, now
                    elif now - seen[rank][1] > patience:
                        self._raise_alarm(rank, beat)

    def _write_beat(self) -> None:
        """Overwrite the heartbeat in place, which works on a full disk too."""
        os.pwrite(self._file, " ".join(map(str, self._beat)).ljust(_BEAT_BYTES).encode(), 0)

    def _read_beat(self, rank: int) -> tuple[Heartbeat | None, float]:
        """A rank's heartbeat and when it was written, which advances as long as its process is not frozen."""
        path = self._folder / f"rank-{rank}"
        return (Heartbeat.parse(path.read_text()), path.stat().st_mtime) if path.exists() else (None, 0.0)

    def _raise_alarm(self, rank: int, beat: Heartbeat) -> None:
        text = (
            f"rank {rank} on {beat.host} (process {beat.pid}) made no progress for {self._patience:g} s, in phase "
            f"{beat.phase} of step {beat.step}: the stacks of all ranks are in {self._stacks}; this attempt ends"
        )
        print(f"distrain: {text}", file=sys.stderr, flush=True)
        (self._folder / "alarm").write_text(text)
        time.sleep(_ALARM_S)
        is_frozen = rank != self._group.rank and beat.host == self._beat.host
        self._end(text, kill=beat if is_frozen else None)  # a frozen process handles no other signal

    def _end(self, text: str, kill: Heartbeat | None = None) -> None:
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._group.rank}-{os.getpid()}.txt").open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        if kill is not None:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(kill.pid)
                if process.create_time() == kill.started:
                    process.kill()
        os._exit(1)
