"""Read a whole file once, from start to end, from a path or a URL."""

import logging
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Protocol, TypeVar

from distrain.data.index import is_remote
from distrain.data.storage.client import read_chunks
from distrain.data.storage.retry import TOOL_POLICY, TOOL_TIMEOUT

_CHUNK = 1 << 20

T = TypeVar("T")

_log = logging.getLogger(__name__)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


class SequentialReader:
    """A file read once: seek() only moves forward, and all bytes read or passed count in size and CRC-32."""

    def __init__(self, file: _Readable) -> None:
        self._file = file
        self.position = 0
        self.crc32 = 0
        self.last = b""  # what the latest read returned

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end of the file."""
        pieces = []
        while size > 0 and (piece := self._file.read(size)):
            self.crc32 = zlib.crc32(piece, self.crc32)
            self.position += len(piece)
            size -= len(piece)
            pieces.append(piece)
        self.last = b"".join(pieces)
        return self.last

    def seek(self, position: int) -> None:
        """Read up to `position` or the end of the file. Raises OSError for a position already passed."""
        if position < self.position:
            raise OSError("damaged: its members overlap")
        while self.position < position and self.read(min(_CHUNK, position - self.position)):
            pass

    def finish(self) -> None:
        """Read up to the end of the file."""
        while self.read(_CHUNK):
            pass


class _ChunkFile:
    """A file-like object over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes, none at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)


def read_once(location: str, read: Callable[[SequentialReader], T]) -> tuple[T, int, int]:
    """Return what `read` returns for a file, and the file's size and CRC-32.

    A remote file is read again from its start when an attempt fails, for about half a minute. Raises OSError.
    """

    def attempt() -> tuple[T, int, int]:
        with _open(location, TOOL_TIMEOUT) as reader:
            result = read(reader)
            reader.finish()
        return result, reader.position, reader.crc32

    if not is_remote(location):
        return attempt()
    return TOOL_POLICY.call(attempt, time.sleep, lambda line: _log.warning("%s: %s", location, line))


@contextmanager
def _open(location: str, timeout: float) -> Iterator[SequentialReader]:
    if is_remote(location):
        with closing(read_chunks(location, timeout)) as chunks:  # type: ignore[type-var]
            yield SequentialReader(_ChunkFile(chunks))
    else:
        with open(location, "rb", buffering=0, opener=open_regular) as file:
            yield SequentialReader(file)


def open_regular(path: str, flags: int) -> int:
    """An opener for files that are read: a pipe or device, which could block or never end, raises OSError."""
    file = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # open() itself refuses a folder
        return file
    os.close(file)
    raise OSError("not a regular file")
