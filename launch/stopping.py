"""Stop requests to a node: by signals and by its launcher."""

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

import psutil

from distrain.errors import EXIT_STOPPED

STOP_LINE = b"stop\n"  # what the launcher writes to a node's standard input to stop it
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_POLL_MS = 200


class StopRequests:
    """Forwards stop signals to the ranks as SIGTERM, at which they save and exit. A second Ctrl-C kills them.

    It works in a thread of its own, because the main thread may be waiting in torch for other nodes, where Python
    handles no signals.
    """

    def __init__(self) -> None:
        self.received = False
        self._interrupts = 0
        self._has_ranks = False
        self._told: set[int] = set()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._handle_signals, args=(reader,), name="stop", daemon=True).start()

    def start_ranks(self) -> None:
        """Called before the ranks are started. Until then a stop signal ends this process at once."""
        self._has_ranks = True

    def watch_stdin(self) -> None:
        """Request a stop at a line on standard input or at its end, as when the launcher dies; kill the ranks at the
        end that follows such a line."""
        threading.Thread(target=self._read_stdin, name="stdin", daemon=True).start()

    def _read_stdin(self) -> None:
        stopping = False
        while os.read(0, len(STOP_LINE)):  # sys.stdin would be locked when the interpreter exits
            stopping = True
            os.kill(os.getpid(), signal.SIGTERM)
        if stopping:
            self._kill_ranks()
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle_signals(self, reader: int) -> None:
        poll = select.poll()
        poll.register(reader)
        while True:
            if poll.poll(_POLL_MS if self.received else None):
                numbers = os.read(reader, 64)
                self._interrupts += numbers.count(signal.SIGINT)
                self.received |= any(number in _SIGNALS for number in numbers)
            if self._interrupts > 1:
                self._kill_ranks()
            if self.received:
                self._forward()

    def _forward(self) -> None:
        if not self._has_ranks:
            print("launch: stopped before training began", file=sys.stderr, flush=True)
            os._exit(EXIT_STOPPED)
        for child in psutil.Process().children():
            if child.pid not in self._told:  # also those that were just being started
                self._told.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGTERM)

    def _kill_ranks(self) -> NoReturn:
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(128 + signal.SIGINT)
