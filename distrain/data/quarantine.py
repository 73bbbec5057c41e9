"""Samples that cannot be used: written down once, counted, and too many of them end the run."""

import fcntl
import json
import threading
from pathlib import Path

from distrain.errors import RankError


class Quarantine:
    """The bad samples of one split of a run, in a file of JSON lines that all ranks append to.

    `limit` is the share of the split's `samples` that may be bad.
    """

    def __init__(self, path: Path, split: str, samples: int, limit: float) -> None:
        self._path = path
        self._split = split
        self._samples = samples
        self._limit = limit
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._read = 0

    def report(self, sample: int, reason: str) -> None:
        """Write a bad sample down. Raises RankError when there are too many."""
        with self._lock:
            if sample not in self._known:
                self._append(sample, reason)
            bad = len(self._known)
        if bad > self._limit * self._samples:
            raise RankError(
                f"{bad} of {self._samples} samples of data.{self._split} cannot be used, more than "
                f"data.max_bad={self._limit:g} allows: {self._path} lists them; mend the data or raise data.max_bad"
            )

    def count(self) -> int:
        """How many bad samples all ranks have found by now."""
        with self._lock:
            if self._path.exists() and self._path.stat().st_size != self._read:
                with self._path.open("rb") as file:
                    self._learn(file.read())
            return len(self._known)

    def _append(self, sample: int, reason: str) -> None:
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            self._learn(content)
            if sample not in self._known:
                entry = {"split": self._split, "sample": sample, "reason": reason}
                gap = b"" if content.endswith(b"\n") or not content else b"\n"  # after a line that a kill cut short
                file.write(gap + json.dumps(entry).encode() + b"\n")
                self._known.add(sample)

    def _learn(self, content: bytes) -> None:
        self._read = len(content)
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["split"] == self._split:
                self._known.add(entry["sample"])
