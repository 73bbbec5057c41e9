"""Reading a whole file once, from start to end, wherever it lies."""

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from distrain.data.index import is_remote

_CHUNK = 1 << 20
_ATTEMPTS = 4  # at a remote file whose download breaks off
_PATIENCE = 60.0  # seconds that a server may be silent

T = TypeVar("T")


class SequentialReader:
    """A file read once, from start to end: seeking reads on, and all that is read counts in size and CRC-32."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.position = 0
        self.crc32 = 0
        self.last = b""  # what the latest read returned

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the file."""
        parts = []
        with _as_os_error():
            while size > 0 and (part := self._file.read(size)):
                self.crc32 = zlib.crc32(part, self.crc32)
                self.position += len(part)
                size -= len(part)
                parts.append(part)
        self.last = b"".join(parts)
        return self.last

    def seek(self, position: int) -> None:
        """Read on to `position`, or to the end of the file. Raises OSError for a position behind."""
        if position < self.position:
            raise OSError("damaged: its members overlap")
        while self.position < position and self.read(min(_CHUNK, position - self.position)):
            pass

    def finish(self) -> None:
        """Read on to the end of the file."""
        while self.read(_CHUNK):
            pass


def read_once(location: str, read: Callable[[SequentialReader], T]) -> tuple[T, int, int]:
    """What `read` makes of a file, and the whole file's size and CRC-32.

    A download that breaks off is begun again a few times. Raises OSError.
    """
    attempt = 1
    while True:
        try:
            with open_sequential(location) as tape:
                result = read(tape)
                tape.finish()
            return result, tape.position, tape.crc32
        except OSError as error:
            hopeless = isinstance(error, (FileNotFoundError, PermissionError))
            if not is_remote(location) or attempt == _ATTEMPTS or hopeless:
                raise
        time.sleep(2.0**attempt)
        attempt += 1


def error_reason(error: Exception) -> str:
    """What went wrong with a file, on one line and without its name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split())


@contextmanager
def open_sequential(location: str) -> Iterator[SequentialReader]:
    """Open a path or URL to be read once. Opening and reading raise OSError."""
    if not is_remote(location):
        with Path(location).open("rb", buffering=0) as file:
            yield SequentialReader(file)
        return
    import fsspec

    with _as_os_error():
        if location.startswith("http"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=_PATIENCE, sock_read=_PATIENCE)
            files, path = fsspec.url_to_fs(location, client_kwargs={"timeout": timeout, "trust_env": True})
            remote = files.open(path, "rb", block_size=0)  # one stream, for not every server knows ranges
        else:
            files, path = fsspec.url_to_fs(location)
            remote = files.open(path, "rb", block_size=16 * _CHUNK, cache_type="readahead")
    with remote:
        yield SequentialReader(remote)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Every remote file system has errors of its own: aiohttp's, botocore's, ..."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        kind = PermissionError if getattr(error, "status", 0) in (401, 403) else OSError
        raise kind(f"{type(error).__name__}: {error}") from error
