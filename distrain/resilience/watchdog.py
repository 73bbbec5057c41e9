"""Hang detection: a rank without progress is named, every rank dumps its stacks, and the attempt ends.

Each rank has a thread that watches its own rank and the next one of its node, through memory that the node's ranks
share: a stuck rank still has a running thread to report it, and a frozen process has a neighbor. The first rank of each
node also watches the first one of the next node, by UDP. No file is involved, because a shared file system may be full,
slow or absent, and no server, because one of the ranks would serve it, and that may be the hung one.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from distrain.parallel.group import Group
from distrain.processes import process_ticks
from distrain.resilience.heartbeats import DONE, Heartbeat, NodeHeartbeats
from distrain.resilience.messages import NodeMessages

_ALARM_S = 1.0  # for the other ranks to see an alarm
_ALARMS = 4  # messages, as one may be lost
_TICK_S = 0.25  # at most, between two looks
_STACKS_S = 10.0  # to write the stacks; a file system that does not answer does not keep a hung rank alive

log = logging.getLogger(__name__)


class Watchdog:
    """Ends this process, and with it the attempt, if any rank makes no progress for `patience` seconds.

    Frozen processes are found from the beginning; others have to make progress from their first heartbeat on.
    A context manager that owns the thread. A patience of 0 disables it.
    """

    def __init__(self, group: Group, run_folder: Path, patience: float) -> None:
        self._group = group
        self._stacks = run_folder / "stacks"
        self._patience = patience
        self._tick = min(_TICK_S, patience / 20)
        self._clock = 0.0  # seconds for which this thread has run: a job that was suspended has not hung
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: its last sign of life, and when it came
        self._beat = Heartbeat()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._messages: NodeMessages | None = None
        self._warned = False

    def __enter__(self) -> Self:
        if self._patience:
            self._node = NodeHeartbeats(self._group)
            if len(self._group.nodes) > 1:
                self._messages = NodeMessages(self._group)
            self._thread = threading.Thread(target=self._watch_ranks, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()
        self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._messages is not None:
            self._messages.close()

    def finish(self) -> None:
        """Record that this rank need not be watched any more."""
        self._beat = self._beat._replace(beats=DONE)

    def heartbeat(self, phase: str, step: int) -> None:
        """Record that this rank makes progress, and where it is."""
        self._beat = Heartbeat(self._beat.beats + 1, phase, step)

    def _watch_ranks(self) -> None:
        rank, node = self._group.rank, self._group.node
        neighbor = node[(rank - node[0] + 1) % len(node)]
        messages = self._messages if self._group.is_node_main else None
        over, number, before = False, 0, time.monotonic()
        while not over:
            over, number = self._done.is_set(), number + 1
            self._node.write(rank, number, self._beat)
            if messages is not None:
                messages.send_heartbeat(number, self._beat)
            if over:
                break
            text = self._wait(messages) or self._node.alarm()
            if text:
                self._end(text)
            now = time.monotonic()
            self._clock, before = self._clock + min(now - before, 2 * self._tick), now
            # Frozen processes first: a rank that waits for one makes no progress either, and has more patience.
            if neighbor != rank:
                self._look_at(neighbor, *self._node.read(neighbor), self._patience)
            if messages is not None:
                self._look_at_next_node(messages)
            if self._beat.beats:
                self._look_at(rank, self._beat.beats, self._beat, 1.25 * self._patience)

    def _wait(self, messages: NodeMessages | None) -> str:
        """Wait for a moment; return the text of an alarm that another node sends meanwhile, else ""."""
        if messages is None:
            self._done.wait(self._tick)
            return ""
        text = messages.receive(self._tick)
        if text:
            self._node.set_alarm(text)
            time.sleep(2 * self._tick)  # for the other ranks of this node to see it
        return text

    def _look_at_next_node(self, messages: NodeMessages) -> None:
        if messages.received is not None:
            self._look_at(messages.next, *messages.received, self._patience)
        elif self._clock > self._patience and not self._warned:
            self._warned = True
            log.warning(
                "%s receives no UDP messages from %s, so that nobody will notice if that host freezes: let hosts of a "
                "job exchange UDP", self._group.peers[self._group.rank].host, self._group.peers[messages.next].host
            )  # fmt: skip

    def _look_at(self, rank: int, sign: int, beat: Heartbeat, patience: float) -> None:
        """Raise the alarm if the sign of life of a rank has been the same for longer than `patience`."""
        if beat.beats == DONE:
            return
        if rank not in self._seen or self._seen[rank][0] != sign:
            self._seen[rank] = sign, self._clock
        elif self._clock - self._seen[rank][1] > patience:
            self._raise_alarm(rank, beat)

    def _raise_alarm(self, rank: int, beat: Heartbeat) -> None:
        peer = self._group.peers[rank]
        text = (
            f"rank {rank} on {peer.host} (process {peer.pid}) made no progress for {self._patience:g} s, in phase "
            f"{beat.phase} of step {beat.step}: the stacks of all ranks are in {self._stacks}; this attempt ends"
        )
        with suppress(OSError):
            print(f"distrain: {text}", file=sys.stderr, flush=True)
        self._node.set_alarm(text)
        for _ in range(_ALARMS):
            if self._messages is not None:
                self._messages.send_alarm(text)
            time.sleep(_ALARM_S / _ALARMS)
        is_frozen = rank != self._group.rank and rank in self._group.node
        self._end(text, kill=rank if is_frozen else None)  # a frozen process handles no other signal

    def _end(self, text: str, kill: int | None = None) -> None:
        writing = threading.Thread(target=self._write_stacks, args=(text,), daemon=True)
        writing.start()
        writing.join(_STACKS_S)
        if kill is not None:
            peer = self._group.peers[kill]
            with suppress(ProcessLookupError):
                if process_ticks(peer.pid) == peer.ticks:
                    os.kill(peer.pid, signal.SIGKILL)
        os._exit(1)

    def _write_stacks(self, text: str) -> None:
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"rank-{self._group.rank}-{os.getpid()}.txt").open("w") as file:
                file.write(f"{text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file)
