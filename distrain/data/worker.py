"""A process that works for this one: decoders are written in C, and an image that crashes one ends the process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from distrain import lifetime

TIMEOUT_S = 60  # for an image
_POLL_S = 0.1
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class WorkerEnded(Exception):  # noqa: N818, it is not an error
    """The process has ended. `reason` says what the work did that ended it, and is empty unless the work did;
    `how` is how it ended."""

    def __init__(self, code: int) -> None:
        self.how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self.reason = ""
        if -code == signal.SIGALRM:
            self.reason = f"was not decoded within {TIMEOUT_S} s"
        elif -code in _CRASHES:
            self.reason = f"crashes the decoder ({self.how})"
        super().__init__(self.reason or self.how)


class Worker:
    """A process that answers messages, one after another. It ends with the thread that started it."""

    def __init__(self, module: str) -> None:
        """Start `python -m module`, which calls `serve`."""
        ours, theirs = socket.socketpair()
        self._pipe = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C in a terminal is for this process, which then ends it
            )

    def ask(self, message: Any, poll: Callable[[], None] = lambda: None) -> Any:
        """Return the answer to a message. Raises WorkerEnded, and what `poll` raises, which is called every now and
        then; no more can be asked then."""
        try:
            with suppress(BrokenPipeError):  # it may have ended after it answered
                self._pipe.send(message)
            while not self._pipe.poll(_POLL_S):
                poll()
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise WorkerEnded(self._process.wait()) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process at once."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.close()


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the messages of the process that started this one as a worker, until it ends."""
    descriptor, parent = map(int, sys.argv[1:])
    with suppress(EOFError, ConnectionError, ProcessLookupError), Connection(descriptor) as pipe:
        lifetime.end_with(parent)
        while True:
            pipe.send(answer(pipe.recv()))
