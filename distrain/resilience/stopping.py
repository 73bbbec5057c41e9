"""Stop requests: a signal, a file, a time budget. They only set a flag; the training loop acts on it between steps."""

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import ClassVar, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """True once this process was asked to stop. A context manager that owns the signal handlers.

    Schedulers send SIGTERM at preemption and, on request, SIGUSR1 some time before the time limit. A second SIGINT
    (Ctrl-C) exits at once.
    """

    sigterm_came: ClassVar[bool] = False  # even to a request that is closed

    def __init__(self, folder: Path, minutes: float = 0.0) -> None:
        """Becomes true `minutes` from now; 0 disables this."""
        self.reason = ""
        self._file = folder / "stop"
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if not self.reason and self._file.exists():
            self.reason = f"file {self._file}"
        if not self.reason and time.monotonic() > self._deadline:
            self.reason = f"train.max_minutes={self._minutes:g}"
        return bool(self.reason)

    def clear_file(self) -> None:
        """Remove the stop file, so that the next start does not stop at once."""
        self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            os._exit(128 + number)
        StopRequest.sigterm_came |= number == signal.SIGTERM
        self.reason = signal.Signals(number).name
