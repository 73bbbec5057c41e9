"""Stop requests: a signal, a file, a time budget. They only set a flag; the training loop acts on it between steps."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import ClassVar, Self

log = logging.getLogger(__name__)

_LOOK_S = 1.0  # between two looks for the file, which may be on a disk that many runs share
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """True once this process was asked to stop. A context manager that owns the signal handlers.

    Schedulers send SIGTERM at preemption and, on request, SIGUSR1 some time before the time limit. A second SIGINT
    (Ctrl-C) exits at once, also while the main thread waits for another rank and handles no signal: a thread does that.
    """

    sigterm_came: ClassVar[bool] = False  # even to a request that is closed

    def __init__(self, folder: Path | None, minutes: float = 0.0) -> None:
        """Becomes true `minutes` from now, unless 0, and when there is a file `stop` in `folder`, unless None."""
        self.reason = ""
        self._file = folder and folder / "stop"
        self._next_look = 0.0
        self._minutes = minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=_exit_at_second_interrupt, args=(reader,), name="interrupts", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_writer)
        os.close(self._writer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def ends_job(self) -> bool:
        """Whether this process stops for a reason for which no agent should start it again."""
        return self.reason.startswith(("file ", "train."))

    def __bool__(self) -> bool:
        now = time.monotonic()
        if not self.reason and self._file is not None and now >= self._next_look:
            self._next_look = now + _LOOK_S
            with suppress(OSError):  # a folder that is temporarily unavailable is looked at again later
                if self._file.exists():
                    self.reason = f"file {self._file}"
        if not self.reason and now > self._deadline:
            self.reason = f"train.max_minutes={self._minutes:g}"
        return bool(self.reason)

    def clear_file(self) -> None:
        """Remove the stop file, so that the next start does not stop at once."""
        if self._file is not None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:  # must not hide that everything is saved
                log.warning("%s cannot be removed: %s; remove it before the next start", self._file, error.strerror)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        StopRequest.sigterm_came |= number == signal.SIGTERM
        self.reason = signal.Signals(number).name


def _exit_at_second_interrupt(reader: int) -> None:
    """Read the numbers of the signals that come, until the other end of the pipe is closed."""
    interrupts = 0
    while numbers := os.read(reader, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            os._exit(128 + signal.SIGINT)
    os.close(reader)
