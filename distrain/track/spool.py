"""The run's own record of its metrics: a JSON lines file that does not depend on a tracking server."""

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from distrain.files import read_regular

log = logging.getLogger(__name__)


_TIMES = ("train/images_per_second", "checkpoint/stall_seconds")  # which differ each time that a step is trained


class Entry(NamedTuple):
    """Metrics after `step` updates, at `time` in milliseconds since 1970."""

    step: int
    time: int
    metrics: dict[str, float]


class Spool:
    """Appends entries to a file and keeps them in memory. When a restarted run trains a step again, what has another
    value than before is recorded again: of entries for the same step the last one counts."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._entries, complete = _read(path)
        self._newest = {(entry.step, name): value for entry in self._entries for name, value in entry.metrics.items()}
        self._file = path.open("ab", buffering=0)
        self._file.truncate(complete)  # a line that a kill left incomplete
        self._size = complete
        self._unwritten = b""

    def entries(self, start: int = 0) -> list[Entry]:
        """All entries from number `start` on."""
        with self._lock:
            return self._entries[start:]

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record the metrics that are new or different at this step. Returns whether there were any."""
        new = {name: float(value) for name, value in metrics.items() if self._is_new(step, name, float(value))}
        if not new:
            return False
        entry = Entry(step, time.time_ns() // 1_000_000, new)
        with self._lock:
            self._entries.append(entry)
            self._newest.update(((step, name), value) for name, value in new.items())
            self._unwritten += json.dumps(entry._asdict()).encode() + b"\n"
            self._write()
        return True

    def _is_new(self, step: int, name: str, value: float) -> bool:
        before = self._newest.get((step, name))
        return before is None or (repr(before) != repr(value) and name not in _TIMES)  # repr, as NaN differs from NaN

    def sync(self) -> None:
        """Flush all entries to disk. Raises OSError."""
        with self._lock:
            if self._unwritten:
                self._write()
            if self._unwritten:
                raise OSError(f"{self._file.name}: metrics cannot be written")
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        """Write what is not on disk yet; if that fails it is kept for the next call."""
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
        log.error("metrics cannot be written: %s; they are kept in memory, and training continues", reason)


def _parse(line: bytes) -> Entry:
    """Raises ValueError or TypeError unless a line is an entry."""
    entry = Entry(**json.loads(line))
    if type(entry.step) is not int or type(entry.time) is not int or not isinstance(entry.metrics, dict):
        raise TypeError
    if not all(type(value) is float for value in entry.metrics.values()):
        raise TypeError
    return entry


def read_entries(path: Path) -> list[Entry]:
    """The complete entries of a run's metrics.jsonl. Raises OSError."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Entry], int]:
    """The complete entries of a file, and their size in bytes."""
    entries: list[Entry] = []
    complete = unreadable = 0
    if path.exists():
        for line in read_regular(path).splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            complete += len(line)
            try:
                entries.append(_parse(line))
            except (ValueError, TypeError, RecursionError):  # a power loss may leave zeros
                unreadable += 1
    if unreadable:
        log.warning("%s: skipped %d unreadable lines", path, unreadable)
    return entries, complete
