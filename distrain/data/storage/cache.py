"""Downloaded shards in a folder that all processes of a node share, never more than so many bytes of them.

NAME.shard is whole. NAME.part is being downloaded, by the one who holds its lock; it has its full size from the
start, so what is still to come counts too. A shard is locked while it is read or removed, and the file `lock` while
room is made. The locks are those of flock: the kernel frees them when their owner dies, however it dies.
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

from distrain.data.storage.download import Closed
from distrain.errors import UserError

_POLL = 0.02  # seconds
_SPARE = 2**30  # bytes left free on the disk, or a hundredth of it if that is less: others need some too

Write = Callable[[bytes, int], None]


class ShardCache:
    """At most `limit` bytes of shards in `folder`. Makes room by removing what was not used for longest.

    Raises UserError when the folder cannot be used, and Closed out of waiting once `closing` is set.
    """

    def __init__(self, folder: Path, limit: int, closing: threading.Event) -> None:
        self._folder = folder
        self._limit = limit
        self._closing = closing
        with self._explained():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for part in folder.glob("*.part"):  # of downloads that were killed; living ones are locked
                _remove_idle(part)

    def touch(self, name: str) -> bool:
        """Count a shard as just used. Returns whether it is there."""
        with self._explained():
            try:
                _stamp(self._whole(name))
            except FileNotFoundError:
                return False
            return True

    def read(self, name: str, size: int, offset: int, length: int, download: Callable[[Write], None]) -> bytes:
        """Bytes of a shard of `size` bytes, which `download` writes if it is not there. Short if they are not."""
        with self._explained(size):
            file = self._fetch(name, size, download)
            try:
                return os.pread(file, length, offset)
            finally:
                os.close(file)

    def fetch(self, name: str, size: int, download: Callable[[Write], None]) -> None:
        """Have a shard of `size` bytes, which `download` writes if it is not there."""
        with self._explained(size):
            os.close(self._fetch(name, size, download))

    def remove_damaged(self, name: str, size: int, crc32: int) -> bool:
        """Remove a shard that is no longer what was downloaded. Returns whether it is gone."""
        with self._explained():
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
                if _is_at(file, self._whole(name)):
                    self._whole(name).unlink()
            return True

    def _fetch(self, name: str, size: int, download: Callable[[Write], None]) -> int:
        """The descriptor of a whole shard, locked, so that it stays until that is closed."""
        while (file := self._open(name)) is None:
            part = self._lock_part(name)
            try:
                if _is_at(part, self._part(name)) and self._complete(part, name, size, download):
                    return os.dup(part)
            finally:
                os.close(part)
        return file

    def _complete(self, part: int, name: str, size: int, download: Callable[[Write], None]) -> bool:
        """Download into a part that is locked. Returns False if somebody else has done so by now."""
        try:
            if self._whole(name).exists():
                self._part(name).unlink()
                return False
            self._reserve(part, size)
            download(partial(self._write, part))
            _stamp(part)
            with self._exclusive():  # lest one who counts sees it neither here nor there
                self._part(name).rename(self._whole(name))
            return True
        except BaseException:
            self._part(name).unlink(missing_ok=True)
            raise

    def _open(self, name: str) -> int | None:
        try:
            file = os.open(self._whole(name), os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if not os.fstat(file).st_nlink:  # removed before it was locked
            os.close(file)
            return None
        _stamp(file)
        return file

    def _lock_part(self, name: str) -> int:
        file = os.open(self._part(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _try_lock(file):
                self._pause()
        except BaseException:
            os.close(file)
            raise
        return file

    def _reserve(self, part: int, size: int) -> None:
        """Wait until there is room for `size` bytes, and take it."""
        while True:
            with self._exclusive():
                if self._make_room(size):
                    os.posix_fallocate(part, 0, size)
                    return
            self._pause()

    def _make_room(self, size: int) -> bool:
        """Remove what was not used for longest until `size` bytes fit. Returns False if all there is is in use."""
        files = sorted(self._files(), key=lambda entry: entry[1].st_mtime_ns, reverse=True)
        used = sum(stat.st_size for _, stat in files)
        while not self._fits(used, size):
            if not used:
                raise self._full(size)
            if not files:
                return False
            path, stat = files.pop()
            if _remove_idle(path):
                used -= stat.st_size
        return True

    def _fits(self, used: int, size: int) -> bool:
        disk = shutil.disk_usage(self._folder)
        return used + size <= self._limit and disk.free - size >= min(_SPARE, disk.total // 100)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._folder.iterdir():
            if path.suffix in (".shard", ".part"):
                with suppress(FileNotFoundError):
                    yield path, path.stat()

    def _write(self, part: int, data: bytes, offset: int) -> None:
        with self._explained(len(data)):  # here, lest a full disk counts as a download that failed
            rest = memoryview(data)
            while rest:
                written = os.pwrite(part, rest, offset)
                rest, offset = rest[written:], offset + written

    def _pause(self) -> None:
        if self._closing.wait(_POLL):
            raise Closed

    def _whole(self, name: str) -> Path:
        return self._folder / f"{name}.shard"

    def _part(self, name: str) -> Path:
        return self._folder / f"{name}.part"

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        file = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _explained(self, size: int = 0) -> Iterator[None]:
        """Turn what the disk says, while it is to take `size` bytes, into one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(size) from error
            raise UserError(
                f"{self._folder}: cannot hold downloaded shards: {error.strerror}; "
                "set download.cache to another folder",
                scope="rank",
            ) from error

    def _full(self, size: int) -> UserError:
        free = shutil.disk_usage(self._folder).free
        return UserError(
            f"{self._folder}: the disk is full: {free / 1e6:,.0f} MB are free and the next shard takes "
            f"{size / 1e6:,.0f} MB; free some space or set download.cache to a folder on another disk",
            scope="rank",
        )


def _remove_idle(path: Path) -> bool:
    """Remove a file unless it is locked. Returns whether it was removed."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        idle = _try_lock(file) and _is_at(file, path)
        if idle:
            path.unlink()
        return idle
    finally:
        os.close(file)


def _stamp(file: int | Path) -> None:
    """Note that a file was used now; the kernel's own time stamps may be some milliseconds old."""
    now = time.time_ns()
    os.utime(file, ns=(now, now))


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that a path names by now."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
