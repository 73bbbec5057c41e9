"""Watching over ranks: one that stops moving gets every rank's stack written down, is named, and ends the attempt.

Each rank has a thread that tells a store how far its rank has come, and looks after its own rank and the next one: a
rank that is stuck still has a thread to say so, and one that is frozen has a neighbour.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from distrain.parallel.group import Group

_ALARM = "alarm"
_LAST_WORDS_S = 1.0  # for the other ranks to hear of it


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

    def __init__(self, group: Group, folder: Path, patience: float) -> None:
        self._rank, self._world = group.rank, group.world
        self._folder = folder
        self._patience = patience
        self._beat = Beat(0, "start", 0, socket.gethostname(), os.getpid())
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._patience:
            self._store = _open_store(self._world)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
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

    def _watch(self) -> None:
        neighbour = (self._rank + 1) % self._world
        seen: dict[int, tuple[Beat, float]] = {}
        last_word = time.monotonic()
        while True:
            over = self._done.wait(min(1.0, self._patience / 8))
            now = time.monotonic()
            try:
                self._store.set(f"beat/{self._rank}", " ".join(map(str, self._beat)))
                if over:
                    return
                for rank in {self._rank, neighbour}:
                    beat = self._beat if rank == self._rank else self._look_at(rank)
                    if beat is None or beat.moves == -1:
                        continue
                    if rank not in seen or seen[rank][0].moves != beat.moves:
                        seen[rank] = beat, now
                    elif now - seen[rank][1] > self._patience:
                        self._raise_alarm(rank, beat)
                if self._store.check([_ALARM]):
                    self._end(self._store.get(_ALARM).decode())
                last_word = now
            except (RuntimeError, DistError):  # the store is gone, with the rank or agent that kept it
                if over:
                    return
                if now - last_word > self._patience:
                    self._end("lost the store through which ranks watch one another")

    def _look_at(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat.parse(self._store.get(key).decode()) if self._store.check([key]) else None

    def _raise_alarm(self, rank: int, beat: Beat) -> None:
        text = (
            f"rank {rank} on {beat.host} (process {beat.pid}) has not moved for {self._patience:g} s, in phase "
            f"{beat.phase} of step {beat.step}: the stacks of all ranks are in {self._folder}; this attempt ends"
        )
        if not self._store.check([_ALARM]):
            print(f"distrain: {text}", file=sys.stderr, flush=True)
        self._store.set(_ALARM, text)
        time.sleep(_LAST_WORDS_S)
        is_frozen = rank != self._rank and beat.host == self._beat.host
        self._end(text, kill=beat.pid if is_frozen else None)  # as it would not hear of anything else

    def _end(self, text: str, kill: int | None = None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank-{self._rank}-{os.getpid()}.txt").open("w") as file:
            file.write(f"{text}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        if kill is not None:
            os.kill(kill, signal.SIGKILL)
        os._exit(1)


def _open_store(world: int) -> Store:
    """A store that all ranks of this attempt share, apart from the one that the process group uses."""
    if world == 1 or "MASTER_ADDR" not in os.environ:
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
    return PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
