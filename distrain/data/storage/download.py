"""Download one file from a URL completely and verify its checksum, over an unreliable network."""

import logging
import threading
import zlib
from collections.abc import Callable
from typing import TypeVar

from distrain.data.storage.client import GaveUpError, explain, read_chunks
from distrain.data.storage.retry import RetryPolicy
from distrain.errors import TemporaryError, UserError
from distrain.masking import mask_secrets

T = TypeVar("T")

_log = logging.getLogger(__name__)


class DownloadError(TemporaryError):
    """A download that failed at every attempt, for a reason that may be temporary. One line that names the URL."""


class StoreClosed(Exception):  # noqa: N818, it is not an error
    """The work was abandoned because its store was closed."""


class Downloader:
    """Downloads files with retries. A server may be silent for `timeout` seconds. Setting `closing` aborts all work."""

    def __init__(self, policy: RetryPolicy, timeout: float, closing: threading.Event) -> None:
        self._policy = policy
        self._timeout = timeout
        self._closing = closing

    def fetch(self, url: str, size: int, crc32: int, write: Callable[[bytes, int], None]) -> None:
        """Pass the `size` bytes at a URL to `write(data, offset)` until their checksum matches.

        Every attempt restarts at offset 0 and never writes more than `size` bytes. Raises UserError for what the user
        has to fix, DownloadError when the last attempt failed for another reason, StoreClosed.
        """
        previous = None

        def attempt() -> None:
            nonlocal previous
            found = self._copy(url, size, write)
            if found == (size, crc32):
                return
            if found == previous:  # not a transmission error
                raise content_mismatch(url)
            previous = found
            raise OSError(
                f"received {found[0]:,} bytes with checksum {found[1]:08x}, expected {size:,} with {crc32:08x}"
            )

        self._retry(url, attempt, "file not found; restore the shard or index the shards again")

    def read(self, url: str, missing: str) -> bytes:
        """Return the whole content of a URL. Raises as `fetch` does; `missing` is the message if there is no file."""
        return self._retry(url, lambda: b"".join(read_chunks(url, self._timeout)), missing)

    def _retry(self, url: str, attempt: Callable[[], T], missing: str) -> T:
        try:
            return self._policy.call(attempt, self._sleep, lambda line: _log.warning("%s: %s", mask_secrets(url), line))
        except GaveUpError as error:
            raise DownloadError(f"{url}: {error}; check the server and run again") from error
        except OSError as error:
            raise explain(url, error, missing, scope="rank") from error

    def _sleep(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise StoreClosed

    def _copy(self, url: str, size: int, write: Callable[[bytes, int], None]) -> tuple[int, int]:
        """Make one attempt and return the byte count and checksum; of a file too long only that it is too long."""
        received, crc32 = 0, 0
        for chunk in read_chunks(url, self._timeout, size):
            if self._closing.is_set():
                raise StoreClosed
            if received + len(chunk) > size:
                return size + 1, 0
            write(chunk, received)
            received += len(chunk)
            crc32 = zlib.crc32(chunk, crc32)
        return received, crc32


def content_mismatch(location: str) -> UserError:
    """Return the error for a shard whose content is not what was indexed."""
    return UserError(
        f"{location}: content differs from the index; restore the original shard or index it again", scope="rank"
    )
