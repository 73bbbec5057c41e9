"""A cache of downloaded shards of bounded size, in a folder shared by all processes of a node.

NAME.shard is complete. NAME.part is being downloaded by the process that holds its lock; it is allocated at full size,
so that the bytes still missing count too. A shard is locked while it is read or removed, and the file `lock` during
eviction. All locks are flock locks, which the kernel releases when their owner dies for any reason.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from distrain.data.storage.download import StoreClosed
from distrain.data.storage.locks import is_still_at, remove_idle, try_lock
from distrain.errors import UserError

_POLL = 0.02  # seconds
_MIN_FREE = 2**30  # bytes left free on the disk for others, or 1% of the disk if that is less

Write = Callable[[bytes, int], None]


class ShardCache:
    """At most `limit` bytes of shards in `folder`; the least recently used ones are evicted first.

    Every method raises UserError when the folder cannot be used, and StoreClosed when `closing` is set while it waits.
    """

    def __init__(self, folder: Path, limit: int, closing: threading.Event) -> None:
        self._folder = folder
        self._limit = limit
        self._closing = closing
        with self._translated_errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for fd in folder.glob("*.part"):  # left by killed downloads; active ones are locked
                remove_idle(fd)

    def touch(self, name: str) -> bool:
        """Mark a shard as just used. Returns whether it is cached."""
        with self._translated_errors():
            try:
                _stamp(self._shard_path(name))
            except FileNotFoundError:
                return False
            return True

    def read(self, name: str, size: int, offset: int, length: int, download: Callable[[Write], None]) -> bytes:
        """Return bytes of a shard of `size` bytes, which `download` writes if it is not cached. Short at its end."""
        with self._translated_errors(size):
            file = self._fetch(name, size, download)
            try:
                return os.pread(file, length, offset)
            finally:
                os.close(file)

    def fetch(self, name: str, size: int, download: Callable[[Write], None]) -> None:
        """Cache a shard of `size` bytes, which `download` writes unless it is cached already."""
        with self._translated_errors(size):
            os.close(self._fetch(name, size, download))

    def remove_damaged(self, name: str, size: int, crc32: int) -> bool:
        """Remove a shard if its content has changed since the download. Returns whether it is gone."""
        with self._translated_errors():
            file = self._open(name)
            if file is None:
                return True
            with os.fdopen(file, "rb") as content:
                found, length = 0, 0
                while piece := content.read(2**20):
                    found, length = zlib.crc32(piece, found), length + len(piece)
                if (found, length) == (crc32, size):
                    return False
                fcntl.flock(file, fcntl.LOCK_EX)
                if is_still_at(file, self._shard_path(name)):
                    self._shard_path(name).unlink()
            return True

    def _fetch(self, name: str, size: int, download: Callable[[Write], None]) -> int:
        """Return a descriptor of a complete shard, whose lock prevents eviction until it is closed."""
        while (file := self._open(name)) is None:
            fd = self._lock_partial(name)
            try:
                if is_still_at(fd, self._partial_path(name)) and self._complete(fd, name, size, download):
                    return os.dup(fd)
            finally:
                os.close(fd)
        return file

    def _complete(self, fd: int, name: str, size: int, download: Callable[[Write], None]) -> bool:
        """Download into a locked .part file. Returns False if another process has completed it meanwhile."""
        try:
            if self._shard_path(name).exists():
                self._partial_path(name).unlink()
                return False
            self._reserve(fd, size)
            download(partial(self._write, fd))
            _stamp(fd)
            with self._exclusive():  # so that no eviction counts it under neither name
                self._partial_path(name).rename(self._shard_path(name))
            return True
        except BaseException:
            self._partial_path(name).unlink(missing_ok=True)
            raise

    def _open(self, name: str) -> int | None:
        try:
            file = os.open(self._shard_path(name), os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file).st_nlink:  # removed before it was locked
            os.close(file)
            return None
        _stamp(file)
        return file

    def _lock_partial(self, name: str) -> int:
        file = os.open(self._partial_path(name), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            while not try_lock(file):
                self._pause()
        except BaseException:
            os.close(file)
            raise
        return file

    def _reserve(self, fd: int, size: int) -> None:
        """Wait until there is room for `size` bytes, and allocate them."""
        while True:
            with self._exclusive():
                if self._evict(size):
                    os.posix_fallocate(fd, 0, size)
                    return
            self._pause()

    def _evict(self, size: int) -> bool:
        """Evict the least recently used files until `size` bytes fit. Returns False if all that remain are in use."""
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns, reverse=True)
        used = sum(stat.st_size for _, stat in files)
        while not self._fits(used, size):
            if not used:
                raise self._full(size)
            if not files:
                return False
            path, stat = files.pop()
            if remove_idle(path):
                used -= stat.st_size
        return True

    def _fits(self, used: int, size: int) -> bool:
        disk = shutil.disk_usage(self._folder)
        return used + size <= self._limit and disk.free - size >= min(_MIN_FREE, disk.total // 100)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.iterdir():
            if path.suffix in (".shard", ".part"):
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        with self._translated_errors(len(data)):  # here, so that a full disk is not retried as a failed download
            rest = memoryview(data)
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written

    def _pause(self) -> None:
        if self._closing.wait(_POLL):
            raise StoreClosed

    def _shard_path(self, name: str) -> Path:
        return self._folder / f"{name}.shard"

    def _partial_path(self, name: str) -> Path:
        return self._folder / f"{name}.part"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _translated_errors(self, size: int = 0) -> Iterator[None]:
        """Turn a disk error, while `size` bytes are to be stored, into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(size) from error
            raise UserError(
                f"{self._folder}: cannot cache shards: {error.strerror}; set download.cache to another folder",
                scope="rank",
            ) from error

    def _full(self, size: int) -> UserError:
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"{self._folder}: disk full: {free / 1e6:,.0f} MB free, the next shard needs {size / 1e6:,.0f} MB; "
            "free some space or set download.cache to a folder on another disk",
            scope="rank",
        )


def _stamp(file: int | Path) -> None:
    """Set a file's times to now; the kernel's own time stamps can be several milliseconds old."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))
