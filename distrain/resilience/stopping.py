"""Requests to stop: a signal or a file. They only raise a flag; the training loop acts on it between steps."""

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818, it is not an error
    """The run was asked to stop, and everything is saved."""


class StopRequest:
    """True from the moment somebody asks this process to stop. A context manager that owns the handlers.

    SIGTERM is what schedulers send at preemption, SIGUSR1 what they send on request some time before the limit.
    """

    def __init__(self, folder: Path) -> None:
        self.reason = ""
        self._file = folder / "stop"

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        if not self.reason and self._file.exists():
            self.reason = f"file {self._file}"
        return bool(self.reason)

    def clear_file(self) -> None:
        """Remove the stop file, so that the next start does not stop again."""
        self._file.unlink(missing_ok=True)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
