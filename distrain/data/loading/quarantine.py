"""The list of bad samples of a run. Too many of them end it."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distrain.errors import TemporaryError, UserError
from distrain.files import may_pass, open_regular
from distrain.masking import mask_secrets


class Quarantine:
    """The bad samples of one split, in a file of JSON lines that all ranks append to.

    Only lines that any rank wrote since this object was created count. Lines of earlier starts of the run remain as a
    record: the data may have been fixed since, and what is still bad is found again; only images that crash a decoder
    stay bad as long as their checksum is the same. `limit` is the max fraction of
    the split's `samples` that may be bad; at least one must be good. Raises
    UserError if the file cannot be used, TemporaryError if that may pass.
    """

    def __init__(self, path: Path, split: str, samples: int, limit: float) -> None:
        self._path = path
        self.split = split
        self._samples = samples
        self._limit = limit
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._crashing: dict[int, tuple[int, str]] = {}
        self._read = 0
        with self._one_line():
            if path.exists():
                with open_regular(path) as file:
                    self._catch_up(file)
        self._known.clear()

    def crash_reason(self, sample: int, crc32: int) -> str:
        """Why an image with this checksum must not be decoded; empty if nothing is known against it."""
        known, reason = self._crashing.get(sample, (None, ""))
        return reason if known == crc32 else ""

    def add_crashing(self, sample: int, crc32: int, reason: str) -> None:
        """Record an image that crashes a decoder, for all starts to come. Raises as `add` does."""
        with self._lock, self._one_line():
            self._append(sample, reason, crc32)
            self._known.discard(sample)  # it counts once it is met

    def add(self, sample: int, reason: str) -> None:
        """Record a bad sample. Raises UserError if there are too many or the file cannot be used, TemporaryError if
        that may pass."""
        with self._lock:
            if sample not in self._known:
                with self._one_line():
                    self._append(sample, reason)
            bad = len(self._known)
        if bad == self._samples:
            raise UserError(
                f"none of the {bad} samples of data.{self.split} can be used: {self._path} lists them; fix the data",
                scope="rank",
            )
        if bad > self._limit * self._samples:
            raise UserError(
                f"{bad} of {self._samples} samples of data.{self.split} cannot be used, more than "
                f"data.max_bad={self._limit:g} allows: {self._path} lists them; fix the data or raise data.max_bad",
                scope="rank",
            )

    def count(self) -> int:
        """Return the number of bad samples that all ranks have found so far, as far as the file can be read now."""
        with self._lock, suppress(TemporaryError), self._one_line():
            if self._path.exists() and self._path.stat().st_size > self._read:
                with open_regular(self._path) as file:
                    self._catch_up(file)
        return len(self._known)

    def _append(self, sample: int, reason: str, crc32: int | None = None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            truncated = self._catch_up(file)
            if sample not in self._known:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                entry = {"time": now, "split": self.split, "sample": sample, "reason": mask_secrets(reason)}
                if crc32 is not None:
                    entry["crashing"] = crc32
                    self._crashing[sample] = crc32, reason
                file.write((b"\n" if truncated else b"") + json.dumps(entry).encode() + b"\n")
                file.flush()  # so that a full disk raises here, not in close
                os.fsync(file.fileno())  # once a checkpoint is saved, no later start finds it again
                self._known.add(sample)

    def _catch_up(self, file: IO[bytes]) -> bool:
        """Read what was appended since the last call. Returns whether the last line is incomplete, as after a kill."""
        file.seek(self._read)
        content = file.read()
        complete = _complete_lines(content)
        self._read += complete
        for line in content[:complete].splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # not a line that was written here
                entry = json.loads(line)
                if entry["split"] == self.split and entry["sample"] in range(self._samples):
                    sample = int(entry["sample"])
                    self._known.add(sample)
                    if "crashing" in entry:
                        self._crashing[sample] = int(entry["crashing"]), str(entry["reason"])
        return len(content) > complete

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"{self._path}: cannot record bad samples: {error.strerror}; free disk space"
            if may_pass(error):
                raise TemporaryError(f"{text} or check its file system, and run again") from error
            raise UserError(f"{text}, or set run.dir to a writable folder", scope="rank") from error


def _complete_lines(content: bytes) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    return content.rfind(b"\n") + 1
