"""The attempts of a run: how each began and ended, and what a restart cost.

attempt.json holds the current attempt, `beat` the step it has reached, attempts.jsonl a line for each attempt that
started to train. Only the main rank writes them.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrain.errors import StaleAttemptError, UserError
from distrain.files import read_json, write_json

log = logging.getLogger(__name__)

_BEAT_BYTES = 64


class Ledger:
    """The record of this process's attempt."""

    def __init__(self, folder: Path, ranks: int, committed_step: int, allowed: int) -> None:
        """Begin an attempt.

        Raises UserError if `allowed` attempts in a row (0: unlimited) ended without a new checkpoint.
        """
        self._folder = folder
        self._current = folder / "attempt.json"
        before = self._read()
        without_progress = 0
        if before.get("crashed") and before.get("committed") == committed_step:
            without_progress = before.get("without_progress", 0) + 1
        if allowed and without_progress >= allowed:
            raise UserError(
                f"{self._current}: {without_progress} attempts in a row ended without a checkpoint after step "
                f"{committed_step}: fix the cause, which their logs show, delete that file, and run again"
            )
        self.attempt = before.get("attempt", 0) + 1
        self._host = socket.gethostname()
        self._cause = "" if not before else before["end"] or "exited without reporting: killed, or its host was lost"
        self._reached, last_beat = self._read_beat()
        began = process_start()
        self._seconds = {"down": began - last_beat if last_beat else 0.0, "join": time.time() - began}
        self._restored = time.time()
        self._from_step = 0
        self._write(
            attempt=self.attempt, host=self._host, pid=os.getpid(), ranks=ranks, began=began, end=None,
            crashed=True, without_progress=without_progress, committed=committed_step,
        )  # fmt: skip
        self._beat = os.open(folder / "beat", os.O_RDWR | os.O_CREAT, 0o644)

    def restored(self, step: int, seconds: float) -> None:
        """Record the step at which this attempt starts to train, and how long loading took."""
        self._from_step = step
        self._seconds["load"] = seconds
        self._restored = time.time()

    def record_step(self, step: int) -> None:
        """Record that `step` updates are done."""
        with _reported(self._folder):
            os.pwrite(self._beat, f"{step} {time.time():.3f}".ljust(_BEAT_BYTES).encode(), 0)
        if "first_step" not in self._seconds:
            self._seconds["first_step"] = time.time() - self._restored
            entry = {
                "attempt": self.attempt,
                "host": self._host,
                "cause": self._cause,
                "from_step": self._from_step,
                "lost_steps": max(0, self._reached - self._from_step),
                "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            }
            with _reported(self._folder), (self._folder / "attempts.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def require_current(self) -> None:
        """Raises StaleAttemptError if a newer attempt has started."""
        current = self._read()
        if current.get("attempt", self.attempt) != self.attempt:
            raise StaleAttemptError(
                f"attempt {self.attempt} of the run in {self._folder} ends: attempt {current['attempt']} on "
                f"{current['host']} has taken over"
            )

    def end(self, cause: str, crashed: bool) -> None:
        """Record how the attempt ended, unless a newer one has started."""
        with _reported(self._folder):
            current = self._read()
            if current.get("attempt") == self.attempt:
                self._write(**{**current, "end": cause, "crashed": crashed})
            os.close(self._beat)

    def _read(self) -> dict[str, Any]:
        return read_json(self._current, "delete it and run again")

    def _write(self, **entry: Any) -> None:
        write_json(self._current, entry)

    def _read_beat(self) -> tuple[int, float]:
        try:
            step, when = (self._folder / "beat").read_text().split()
            return int(step), float(when)
        except (FileNotFoundError, ValueError):
            return 0, 0.0


def process_start() -> float:
    """When this process was started, seconds since 1970; psutil's create_time is off by up to a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Report a record that cannot be written, as on a full disk; the run does not depend on it."""
    try:
        yield
    except OSError as error:
        log.warning("%s: the attempt cannot be recorded: %s", folder, error.strerror)
