"""Samples that cannot be used: written down, counted, and too many of them end the run."""

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from distrain.errors import UserError


class Quarantine:
    """The bad samples of one split of a run, in a file of JSON lines that all ranks append to.

    What counts are the lines that any rank wrote since this was made. Those of earlier starts of the run stay as a
    record: the data may have been mended since, and what is still bad is found again. `limit` is the share of the
    split's `samples` that may be bad; all of them may never be. Raises UserError where the file cannot be used.
    """

    def __init__(self, path: Path, split: str, samples: int, limit: float) -> None:
        self._path = path
        self._split = split
        self._samples = samples
        self._limit = limit
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._read = 0
        with self._explained():
            if path.exists():
                with path.open("rb") as file:
                    self._read = _whole_lines(file.read())

    def report(self, sample: int, reason: str) -> None:
        """Write a bad sample down. Raises UserError when there are too many."""
        with self._lock:
            if sample not in self._known:
                with self._explained():
                    self._append(sample, reason)
            bad = len(self._known)
        if bad == self._samples:
            raise UserError(
                f"none of the {bad} samples of data.{self._split} can be used: {self._path} lists them; mend the data",
                scope="rank",
            )
        if bad > self._limit * self._samples:
            raise UserError(
                f"{bad} of {self._samples} samples of data.{self._split} cannot be used, more than "
                f"data.max_bad={self._limit:g} allows: {self._path} lists them; mend the data or raise data.max_bad",
                scope="rank",
            )

    def count(self) -> int:
        """How many bad samples all ranks have found by now."""
        with self._lock, self._explained():
            if self._path.exists() and self._path.stat().st_size > self._read:
                with self._path.open("rb") as file:
                    self._catch_up(file)
            return len(self._known)

    def _append(self, sample: int, reason: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            cut_short = self._catch_up(file)
            if sample not in self._known:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                entry = {"time": now, "split": self._split, "sample": sample, "reason": reason}
                file.write((b"\n" if cut_short else b"") + json.dumps(entry).encode() + b"\n")
                file.flush()  # here, where the disk's answer is heard
                self._known.add(sample)

    def _catch_up(self, file: IO[bytes]) -> bool:
        """Learn what was appended since. Returns whether the last line is not whole, as a kill may leave it."""
        file.seek(self._read)
        content = file.read()
        whole = _whole_lines(content)
        self._read += whole
        for line in content[:whole].splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["split"] == self._split:
                self._known.add(entry["sample"])
        return len(content) > whole

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path}: bad samples cannot be listed: {error.strerror}; free some space, or set run.dir to a "
                "folder that can be written",
                scope="rank",
            ) from error


def _whole_lines(content: bytes) -> int:
    """How many bytes of it are whole lines."""
    return content.rfind(b"\n") + 1
