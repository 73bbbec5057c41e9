"""The attempts of a run: who is at it, how each began and ended, and what a restart cost.

attempt.json holds the current attempt, `beat` the step it has reached, attempts.jsonl a line for each attempt that
got to train. Only the leading rank writes them.
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from distrain.errors import StaleAttemptError, UserError

_BEAT_BYTES = 64


class Ledger:
    """This process's attempt at a run."""

    def __init__(self, folder: Path, ranks: int, committed_step: int, allowed: int) -> None:
        """Begin an attempt. Raises UserError if `allowed` of them in a row (0: any) ended without a new checkpoint."""
        self._folder = folder
        self._current = folder / "attempt.json"
        before = self._read()
        crashed = bool(before) and before["crashed"]
        without_progress = before["fruitless"] + 1 if crashed and before["committed"] == committed_step else 0
        if allowed and without_progress >= allowed:
            raise UserError(
                f"{self._current}: {without_progress} attempts in a row ended without a checkpoint after step "
                f"{committed_step}: mend what ends them (their last lines tell), delete that file, and run again"
            )
        self.attempt = before.get("attempt", 0) + 1
        self._host = socket.gethostname()
        self._cause = "" if not before else before["end"] or "ended without a word: killed, or its machine lost"
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
        """Note from which step on this attempt trains, and how long it took to load it."""
        self._from_step = step
        self._seconds["load"] = seconds
        self._restored = time.time()

    def beat(self, step: int) -> None:
        """Note that so many updates are done."""
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
            with (self._folder / "attempts.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def require_current(self) -> None:
        """Raises StaleAttemptError if another attempt has begun since this one."""
        current = self._read()
        if current["attempt"] != self.attempt:
            raise StaleAttemptError(
                f"attempt {self.attempt} of the run in {self._folder} ends: attempt {current['attempt']} on "
                f"{current['host']} has taken over"
            )

    def end(self, cause: str, crashed: bool) -> None:
        """Note how it ended, unless another attempt has begun by now."""
        current = self._read()
        if current["attempt"] == self.attempt:
            self._write(**{**current, "end": cause, "crashed": crashed})
        os.close(self._beat)

    def _read(self) -> dict[str, Any]:
        if not self._current.exists():
            return {}
        found = json.loads(self._current.read_text())
        assert isinstance(found, dict)
        return found

    def _write(self, **entry: Any) -> None:
        draft = self._current.with_suffix(".tmp")
        draft.write_text(json.dumps(entry) + "\n")
        draft.replace(self._current)

    def _read_beat(self) -> tuple[int, float]:
        try:
            step, when = (self._folder / "beat").read_text().split()
        except (FileNotFoundError, ValueError):
            return 0, 0.0
        return int(step), float(when)


def process_start() -> float:
    """When this process was started, seconds since 1970."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
