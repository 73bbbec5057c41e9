"""Watching over ranks: one that stops moving gets every rank's stack written down, is named, and ends the attempt.

Each rank has a thread that writes down how far its rank has come, in a file in the run's folder, and looks after its
own rank and the next one: a rank that is stuck still has a thread to say so, and one that is frozen has a neighbour.
Files, because whatever else ranks share is kept by one of them, and that may be the one.
"""

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from distrain.parallel.group import Group

_LAST_WORDS_S = 1.0  # for the other ranks to hear of an alarm


class Beat(NamedTuple):
    """How often a rank has moved, and where it is; `moves` is -1 once it has nothing more to do."""

    moves: int
    phase: str
    step: int
    host: str
    pid: int

    @classmethod
    def parse(cls, text: str) -> Self:
        moves, phase, step, host, pid = text.split()
        return cls(int(moves), phase, int(step), host, int(pid))


class Watchdog:
    """Ends this process, and with it the attempt, if any rank does not move for `patience` seconds.

    A context manager that owns the thread. With a patience of 0 it does nothing.
    """

    def __init__(self, group: Group, run_folder: Path, patience: float) -> None:
        self._group = group
        self._stacks = run_folder / "stacks"
        self._watch = run_folder / "watch"
        self._patience = patience
        self._beat = Beat(0, "start", 0, socket.gethostname(), os.getpid())
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._patience:
            # A folder for this attempt alone, so that nobody is taken for one of an earlier attempt.
            self._folder = self._watch / self._group.broadcast(f"{time.time():.3f}")
            if self._group.is_main:
                shutil.rmtree(self._watch, ignore_errors=True)
                self._folder.mkdir(parents=True, exist_ok=True)
            self._group.barrier()
            self._thread = threading.Thread(target=self._keep_watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beat = self._beat._replace(moves=-1)
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def beat(self, phase: str, step: int) -> None:
        """Say that this rank moves, and where it is."""
        self._beat = self._beat._replace(moves=self._beat.moves + 1, phase=phase, step=step)

    def _keep_watch(self) -> None:
        neighbour = (self._group.rank + 1) % self._group.world  # in a world of one that is itself
        seen: dict[int, tuple[float, float]] = {}  # the sign of life of a rank, and since when it is the same
        over = False
        while not over:
            over = self._done.wait(min(max(self._patience / 20, 0.1), 10.0))
            with suppress(OSError):  # a folder that cannot be reached for a while is no reason to end
                self._write_beat()
                if (self._folder / "alarm").exists() and not over:
                    self._end((self._folder / "alarm").read_text())
                # A frozen neighbour first: whoever waits for it does not move either, and has longer to wait.
                for rank, patience in ((neighbour, self._patience), (self._group.rank, 1.25 * self._patience)):
                    is_own = rank == self._group.rank
                    beat, sign = (self._beat, float(self._beat.moves)) if is_own else self._read_beat(rank)
                    now = time.monotonic()
                    if beat is None or beat.moves == -1:
                        continue
                    if rank not in seen or seen[rank][0] != sign:
                        seen[rank] = sign, now
                    elif now - seen[rank][1] > patience:
                        self._raise_alarm(rank, beat)

    def _write_beat(self) -> None:
        path = self._folder / f"rank-{self._group.rank}"
        draft = path.with_suffix(".tmp")
        draft.write_text(" ".join(map(str, self._beat)))
        draft.replace(path)

    def _read_beat(self, rank: int) -> tuple[Beat | None, float]:
        """A rank's beat and when it was written, which goes on as long as its process is not frozen."""
        path = self._folder / f"rank-{rank}"
        return (Beat.parse(path.read_text()), path.stat().st_mtime) if path.exists() else (None, 0.0)

    def _raise_alarm(self, rank: int, beat: Beat) -> None:
        text = (
            f"rank {rank} on {beat.host} (process {beat.pid}) has not moved for {self._patience:g} s, in phase "
            f"{beat.phase} of step {beat.step}: the stacks of all ranks are in {self._stacks}; this attempt ends"
        )
        print(f"distrain: {text}", file=sys.stderr, flush=True)
        (self._folder / "alarm").write_text(text)
        time.sleep(_LAST_WORDS_S)
        is_frozen = rank != self._group.rank and beat.host == self._beat.host
        self._end(text, kill=beat.pid if is_frozen else None)  # as it would not hear of anything else

    def _end(self, text: str, kill: int | None = None) -> None:
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._group.rank}-{os.getpid()}.txt").open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
        if kill is not None:
            with suppress(ProcessLookupError):
                os.kill(kill, signal.SIGKILL)
        os._exit(1)
