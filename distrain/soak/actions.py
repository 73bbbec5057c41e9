"""What a soak does beside the run: second starts, two attempts at once, power cuts."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distrain.errors import EXIT_USER
from distrain.resilience.faults import HOLD
from distrain.soak.disk import Disk
from distrain.soak.plan import Action
from distrain.soak.training import Progress, Start, Training

_STEADY_STEPS = 5  # without a fault, at half a second each: longer than what any fault still does
_START_S = 180.0  # for a start on a busy machine


class Log:
    """The actions that have begun and ended, in a file that a resumed soak reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]

    def add(self, action: str, attempt: int, problem: str | None = None) -> None:
        """Record that an action begins during `attempt`, or, with a `problem`, how it ended; "" is well."""
        self.entries.append({"action": action, "attempt": attempt, "problem": problem})
        with self._path.open("a") as file:
            file.write(json.dumps(self.entries[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def ended(self) -> set[str]:
        """The actions that have ended."""
        return {entry["action"] for entry in self.entries if entry["problem"] is not None}


class SoakedRun:
    """A run under faults, and what is done beside it."""

    def __init__(self, arguments: Sequence[str], ranks: int, folder: Path, log: Log, disk: Disk | None) -> None:
        self._arguments = [*arguments]
        self._ranks = ranks
        self._hold = folder / HOLD
        self._progress = Progress(folder)
        self._log = log
        self._disk = disk

    def train(self, actions: Sequence[Action], patience: float) -> str:
        """Train to the end. Returns the digest of the weights. Raises UserError if it does not get there."""
        self._hold.unlink(missing_ok=True)
        if attempt := self._progress.attempt:
            self._log.add("resumed", attempt, "")
        ended = self._log.ended()
        waiting = [action for action in actions if str(action) not in ended]
        self._training = Training(self._arguments, self._ranks)
        seen, when = (0, 0), time.monotonic()
        try:
            while not self._training.has_ended():
                now = self._progress.attempt, self._progress.step
                if now != seen:
                    seen, when = now, time.monotonic()
                elif time.monotonic() - when > _START_S + 10 * patience:
                    raise self._training.failure(f"no progress after step {now[1]}")
                if waiting and now[1] >= waiting[0].step:
                    self._do(waiting.pop(0))
                time.sleep(0.02)
            return self._training.digest
        finally:
            self._training.kill()

    def _do(self, action: Action) -> None:
        time.sleep(action.seconds)
        self._log.add(str(action), self._progress.attempt)
        doing: dict[str, Callable[[], str]] = {
            "second-start": self._start_again,
            "other-settings": self._start_with_other_settings,
            "two-attempts": self._start_two,
            "power-cut": self._cut_power,
        }
        self._log.add(str(action), self._progress.attempt, doing[action.kind]())

    def _start_again(self) -> str:
        return self._expect_refusal([], "is alive")

    def _start_with_other_settings(self) -> str:
        return self._expect_refusal(["optimizer.lr=0.123", "run.change=[]"], "optimizer.lr was")

    def _expect_refusal(self, settings: list[str], reason: str) -> str:
        """Start the run while it is alive, with other `settings`. Returns what was wrong, if anything."""
        self._hold.touch()
        try:
            if not self._progress.advances(_STEADY_STEPS, _START_S):
                return "the run made no progress before the second start"
            attempt = self._progress.attempt
            start = Start([*self._arguments, *settings], self._ranks)
            try:
                until = time.monotonic() + _START_S
                while start.code is None and self._progress.attempt == attempt and time.monotonic() < until:
                    time.sleep(0.05)
                code, line = start.code, start.last_line
            finally:
                start.kill()
            if code != EXIT_USER or reason not in line:
                return f"the second start was not refused: exit code {code}, {line}"
            if not self._progress.advances(2, _START_S) or self._progress.attempt != attempt:
                return f"attempt {attempt} did not survive the second start"
            return ""
        finally:
            self._release()

    def _start_two(self) -> str:
        """Kill the run and start it twice at one moment. Returns what was wrong, if anything."""
        self._hold.touch()
        self._training.kill()
        attempt = self._progress.attempt
        starts = [Start(self._arguments, self._ranks) for _ in range(2)]
        try:
            until = time.monotonic() + _START_S
            while all(start.code is None for start in starts) and time.monotonic() < until:
                time.sleep(0.05)
            refused = [start for start in starts if start.code is not None]
            if [start.code for start in refused] != [EXIT_USER] or "is alive" not in refused[0].last_line:
                ends = [f"exit code {start.code}, {start.last_line}" for start in starts]
                return f"of two starts not exactly one was refused: {'; '.join(ends)}"
            if not self._progress.advances(2, _START_S) or self._progress.attempt != attempt + 1:
                return "of two starts none continued the run"
            return ""
        finally:
            for start in starts:
                start.kill()
            self._release()
            self._log.add("restarted", self._progress.attempt, "")
            self._training = Training(self._arguments, self._ranks)

    def _cut_power(self) -> str:
        assert self._disk is not None
        self._disk.cut_power()
        self._training.kill()
        self._disk.unmount()
        self._disk.mount()
        self._training = Training(self._arguments, self._ranks)
        return ""

    def _release(self) -> None:
        with suppress(OSError):
            self._hold.unlink(missing_ok=True)
