"""The retry policy of everything that is read from a server."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from distrain.data.storage.client import GaveUpError, RequestRejectedError, error_reason

_MAX_WAIT = 60.0  # seconds
_FINAL = (FileNotFoundError, PermissionError, RequestRejectedError)  # a retry cannot help

TOOL_TIMEOUT = 10.0  # seconds without a byte after which a tool's download has failed

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Up to `retries` retries, the first after about `first_wait` seconds, each wait twice the one before, up to 60 s.

    Waits vary by half, so that ranks that fail together do not retry together. No retry begins after `within` seconds,
    of which an attempt uses at most a third, however long it took: a long one received data for most of the time.
    """

    retries: int
    first_wait: float
    within: float = float("inf")

    def call(
        self, attempt: Callable[[], T], sleep: Callable[[float], None], info: Callable[[str], None] = lambda line: None
    ) -> T:
        """Return the result of the first attempt that raises no OSError.

        Raises GaveUpError after the last attempt, at once an OSError that a retry cannot fix, and any other exception.
        `info` gets a line per retry.
        """
        jitter = random.SystemRandom()  # leaves the process's seeded generator alone
        number, spent, began = 1, 0.0, time.monotonic()
        while True:
            started = time.monotonic()
            delay = min(self.first_wait * 2 ** (number - 1), _MAX_WAIT) * jitter.uniform(0.5, 1.5)
            try:
                return attempt()
            except _FINAL:
                raise
            except OSError as error:
                reason = error_reason(error)
                spent += min(time.monotonic() - started, self.within / 3) + delay
                if number > self.retries or spent > self.within:
                    tried = f"tried {number} times in {time.monotonic() - began:.0f} s"
                    raise GaveUpError(f"{reason}; {tried}") from error
            info(f"{reason}; attempt {number + 1} of {self.retries + 1} in {delay:.1f} s")
            sleep(delay)
            number += 1


TOOL_POLICY = RetryPolicy(retries=8, first_wait=1.0, within=30.0)
"""For tools, whose user waits at the terminal; training retries as its settings say."""
