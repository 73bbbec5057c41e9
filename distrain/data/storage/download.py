"""One file from a URL, whole and as it was indexed, however the network behaves."""

import errno
import logging
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from distrain.errors import TemporaryError, UserError

_CHUNK = 16 * 2**20
_LONGEST_WAIT = 60.0

# By name, for botocore is imported only where s3 is used.
_CREDENTIAL_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
)

_log = logging.getLogger(__name__)


class DownloadError(TemporaryError):
    """A download that failed at every attempt, for a reason that may pass. One line that names the URL."""


class Closed(Exception):  # noqa: N818, it is not an error
    """The work was given up because its store was closed."""


class Downloader:
    """Downloads with `retries` further attempts, the first after about `wait` seconds and each twice as long after
    the one before. `stall` is for how many seconds a server may be silent. Setting `closing` ends all of it."""

    def __init__(self, retries: int, wait: float, stall: float, closing: threading.Event) -> None:
        self._retries = retries
        self._wait = wait
        self._stall = stall
        self._closing = closing
        self._random = random.Random()

    def fetch(self, url: str, size: int, crc32: int, write: Callable[[bytes, int], None]) -> None:
        """Hand the `size` bytes at a URL to `write`, as pieces with their offsets, until their checksum is right.

        An attempt begins at offset 0 again, and never passes on more than `size` bytes. Raises UserError for what the
        user has to mend, TransferError when the last attempt failed for another reason, Closed.
        """
        before = None

        def attempt() -> str | None:
            nonlocal before
            found = self._copy(url, size, write)
            if found == (size, crc32):
                return None
            if found == before:
                raise content_mismatch(url)
            before = found
            return f"{found[0]:,} bytes with checksum {found[1]:08x} came instead of {size:,} with {crc32:08x}"

        self._persist(url, attempt, "there is no such file; put the shard back or index the shards again")

    def read(self, url: str, missing: str) -> bytes:
        """All that is at a URL. Raises as `fetch` does; `missing` is what to say if there is nothing."""
        content = b""

        def attempt() -> None:
            nonlocal content
            content = b"".join(self._pieces(url, sys.maxsize))

        self._persist(url, attempt, missing)
        return content

    def _persist(self, url: str, attempt: Callable[[], str | None], missing: str) -> None:
        """Make attempts until one succeeds; one that does not raises, or returns the reason."""
        for number in count(1):
            try:
                reason = attempt()
                if reason is None:
                    return
            except (UserError, Closed):
                raise
            except Exception as error:
                if (cure := _find_cure(error, missing)) is not None:
                    raise UserError(f"{url}: {cure}", scope="rank") from error
                reason = f"nothing came for {self._stall:g} s" if isinstance(error, TimeoutError) else _describe(error)
            if number > self._retries:
                raise DownloadError(
                    f"{url}: {reason}, at the last of {number} attempts; see that the server answers and run again"
                )
            delay = min(self._wait * 2 ** (number - 1), _LONGEST_WAIT) * self._random.uniform(0.5, 1.5)
            _log.warning("%s: %s; attempt %d of %d in %.1f s", url, reason, number + 1, self._retries + 1, delay)
            if self._closing.wait(delay):
                raise Closed

    def _copy(self, url: str, size: int, write: Callable[[bytes, int], None]) -> tuple[int, int]:
        """One attempt. Returns how many bytes there are and their checksum; of a file too long only that it is."""
        received, crc32 = 0, 0
        for piece in self._pieces(url, size):
            if self._closing.is_set():
                raise Closed
            if received + len(piece) > size:
                return size + 1, 0
            write(piece, received)
            received += len(piece)
            crc32 = zlib.crc32(piece, crc32)
        return received, crc32

    def _pieces(self, url: str, most: int) -> Iterator[bytes]:
        """A file from its start, to its end or a little beyond `most` bytes."""
        import fsspec

        http = url.startswith(("http://", "https://"))
        files, path = fsspec.url_to_fs(url, **self._settings(url, http))
        if http:  # one stream, for not every server knows ranges
            with files.open(path, block_size=0, size=most) as stream:  # a size spares a request for it
                while piece := stream.read(_CHUNK):
                    yield piece
            return
        files.retries = 1  # s3fs would try five times itself, without a word
        for start in range(0, most, _CHUNK):
            end = most + 1 if start + _CHUNK >= most else start + _CHUNK
            try:
                piece = files.cat_file(path, start=start, end=end)
            except OSError as error:
                if _begins_past_end(error):
                    return
                raise
            yield piece
            if len(piece) < end - start:
                return

    def _settings(self, url: str, http: bool) -> dict[str, Any]:
        if http:
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=self._stall, sock_read=self._stall)
            # trust_env: the proxy that the environment names
            return {"client_kwargs": {"timeout": timeout, "read_bufsize": 2**20, "trust_env": True}}
        if url.startswith(("s3://", "s3a://")):
            once = {"mode": "standard", "total_max_attempts": 1}
            return {"config_kwargs": {"connect_timeout": self._stall, "read_timeout": self._stall, "retries": once}}
        return {}


def content_mismatch(location: str) -> UserError:
    """What to raise for a shard that is not the one that was indexed."""
    return UserError(
        f"{location}: holds other bytes than were indexed; put the old shard back or index it again", scope="rank"
    )


def _begins_past_end(error: OSError) -> bool:
    """Whether s3 refused a range because the file ends before it."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in ("InvalidRange", "416")


def _find_cure(error: Exception, missing: str) -> str | None:
    """What happened and what helps, where trying again does not; None where it may."""
    status = getattr(error, "status", 0)
    if isinstance(error, FileNotFoundError) or status == 410:
        return missing
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _CREDENTIAL_ERRORS:
        return f"access refused ({_describe(error)}); set or renew the credentials"
    refused = 400 <= status < 500 and status not in (408, 425, 429)
    if refused or isinstance(error, (ImportError, ValueError)) or getattr(error, "errno", 0) == errno.EINVAL:
        return f"cannot be asked for ({_describe(error)}); correct the URL or the server's settings"
    return None


def _describe(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
