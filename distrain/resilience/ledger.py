"""What each restart of a run cost: attempts.jsonl has a line for each attempt that started to train.

Only the main rank writes it.
"""

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrain.processes import process_ticks
from distrain.resilience.claim import Claim

log = logging.getLogger(__name__)


class Ledger:
    """The record of this process's attempt."""

    def __init__(self, folder: Path, claim: Claim) -> None:
        self._folder = folder
        self._claim = claim
        before = claim.before
        self._cause = ""
        if before is not None:
            self._cause = before.end or "exited without reporting: killed, or its host was lost"
        self._reached, last_beat = claim.last_beat
        began = process_start()
        self._seconds = {"down": began - last_beat if last_beat else 0.0, "join": time.time() - began}
        self._restored = time.time()
        self._from_step = 0

    def restored(self, step: int, seconds: float) -> None:
        """Record the step at which this attempt starts to train, and how long loading took."""
        self._from_step = step
        self._seconds["load"] = seconds
        self._restored = time.time()

    def record_step(self, step: int) -> None:
        """Record that `step` updates are done."""
        with _reported(self._folder):
            self._claim.record_step(step)
        if "first_step" not in self._seconds:
            self._seconds["first_step"] = time.time() - self._restored
            entry = {
                "attempt": self._claim.record.number,
                "host": self._claim.record.host,
                "cause": self._cause,
                "from_step": self._from_step,
                "lost_steps": max(0, self._reached - self._from_step),
                "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            }
            with _reported(self._folder), (self._folder / "attempts.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def end(self, cause: str, crashed: bool) -> None:
        """Record how the attempt ended, unless a newer one has started."""
        with _reported(self._folder):
            self._claim.end(cause, crashed)


def process_start() -> float:
    """When this process was started, seconds since 1970; psutil's create_time is off by up to a second."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + (process_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Report a record that cannot be written, as on a full disk; the run does not depend on it."""
    try:
        yield
    except OSError as error:
        log.warning("%s: the attempt cannot be recorded: %s", folder, error.strerror)
