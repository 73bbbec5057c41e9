"""The run's own record of its metrics: a file of JSON lines that outlives any tracking server."""

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """Metrics after `step` updates, at `time` in milliseconds since 1970."""

    step: int
    time: int
    metrics: dict[str, float]


class Spool:
    """Appends entries to a file and keeps them at hand. A metric is recorded once per step, however often a
    restarted run passes it."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._entries, whole = _read(path)
        self._seen = {(entry.step, name) for entry in self._entries for name in entry.metrics}
        self._file = path.open("ab", buffering=0)
        self._file.truncate(whole)  # a line that a kill cut short
        self._size = whole
        self._unwritten = b""

    def entries(self, start: int = 0) -> list[Entry]:
        """All entries, or those from place `start` on."""
        with self._lock:
            return self._entries[start:]

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record what is new at this step; say whether anything was."""
        new = {name: float(value) for name, value in metrics.items() if (step, name) not in self._seen}
        if not new:
            return False
        entry = Entry(step, time.time_ns() // 1_000_000, new)
        with self._lock:
            self._entries.append(entry)
            self._seen.update((step, name) for name in new)
            self._unwritten += json.dumps(entry._asdict()).encode() + b"\n"
            self._write()
        return True

    def _write(self) -> None:
        """Bring to disk what is not there yet. Where that fails it is kept for the next time."""
        try:
            if self._file.write(self._unwritten) == len(self._unwritten):
                self._size += len(self._unwritten)
                self._unwritten = b""
                return
            reason = "the disk is full"
        except OSError as error:
            reason = str(error)
        with suppress(OSError):
            self._file.truncate(self._size)
        log.error("metrics cannot be written: %s; they are kept, and training goes on", reason)


def _read(path: Path) -> tuple[list[Entry], int]:
    """The whole entries of a file, and how many bytes they take."""
    entries: list[Entry] = []
    whole = 0
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            entries.append(Entry(**json.loads(line)))
            whole += len(line)
    return entries, whole
