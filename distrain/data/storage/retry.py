"""The retry policy of everything that is read from a server."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from distrain.data.storage.client import RequestRejectedError, error_reason

_MAX_WAIT = 60.0  # seconds
_FINAL = (FileNotFoundError, PermissionError, RequestRejectedError)  # a retry cannot help

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Up to `retries` retries, the first after about `first_wait` seconds, each wait twice the one before, up to 60 s.

    Waits vary by half, so that ranks that fail together do not retry together.
    """

    retries: int
    first_wait: float

    def call(
        self, attempt: Callable[[], T], sleep: Callable[[float], None], info: Callable[[str], None] = lambda line: None
    ) -> T:
        """Return the result of the first attempt that raises no OSError.

        Raises the OSError of the last attempt, or at once one that a retry cannot fix, and any other exception.
        `info` gets a line per retry.
        """
        jitter = random.SystemRandom()  # leaves the process's seeded generator alone
        number = 1
        while True:
            try:
                return attempt()
            except _FINAL:
                raise
            except OSError as error:
                if number > self.retries:
                    raise
                reason = error_reason(error)
            delay = min(self.first_wait * 2 ** (number - 1), _MAX_WAIT) * jitter.uniform(0.5, 1.5)
            info(f"{reason}; attempt {number + 1} of {self.retries + 1} in {delay:.1f} s")
            sleep(delay)
            number += 1
