"""Long offline commands end promptly at Ctrl-C and SIGTERM: a pool of threads, and what to do at the signals."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from distrain.errors import Interrupted

_GRACE_S = 1.0  # for threads to remove their drafts
_DEADLINE_S = 2.0  # after which the process exits, even inside a call that no signal interrupts

T = TypeVar("T")
R = TypeVar("R")
Poll = Callable[[], None]


class Canceled(Exception):  # noqa: N818, it is not an error
    """The work was abandoned because the command ends."""


def map_threads(work: Callable[[T, Poll], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield work(item, poll) of all items in their order, from `workers` threads.

    At an error or interrupt the rest is canceled: `poll()`, to be called every now and then, raises Canceled. Threads
    that do not end within a second are left behind.
    """
    canceled = threading.Event()

    def poll() -> None:
        if canceled.is_set():
            raise Canceled

    pool = ThreadPoolExecutor(workers)
    futures = [pool.submit(work, item, poll) for item in items]
    try:
        for future in futures:
            yield future.result()
        pool.shutdown()
    except BaseException:
        canceled.set()
        pool.shutdown(wait=False, cancel_futures=True)
        wait([future for future in futures if future.running()], timeout=_GRACE_S)
        raise


@contextmanager
def stop_on_signals(kept: str) -> Iterator[None]:
    """Raise Interrupted at SIGINT and SIGTERM, whose message says what is `kept` and how to continue.

    A process that has not ended two seconds later, because it waits inside a library, exits with that message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, kept)

    previous = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    }
    received, sender = socket.socketpair()
    sender.setblocking(False)
    finished = threading.Event()
    previous_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_exit_late, args=(received, finished, previous, kept), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        finished.set()
        sender.close()
        watcher.join()
        received.close()


def _exit_late(received: socket.socket, finished: threading.Event, numbers: Iterable[int], kept: str) -> None:
    """Wait for one of the signals, then for the main thread to react to it, and exit if it does not."""
    while number := received.recv(1):
        if number[0] in numbers and not finished.wait(_DEADLINE_S):
            error = Interrupted(number[0], kept)
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"distrain: {error}\n".encode())
            os._exit(error.code)
