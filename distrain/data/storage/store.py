"""The interface for reading a sample's bytes, and its implementation for local shards."""

import os
import resource
import threading
import zlib
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import Index
from distrain.data.storage.download import content_mismatch
from distrain.errors import TemporaryError, UserError
from distrain.masking import mask_secrets


class Store(Protocol):
    """Reads encoded images by sample id, from any thread."""

    def read(self, sample: int) -> bytes:
        """Return the encoded image.

        Raises DataError naming the shard when the bytes do not match the index, UserError when the whole shard is
        missing or has other content, TemporaryError when it cannot be read at present.
        """
        ...

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Announce samples that will be read later, in reading order. Returns at once."""
        ...

    def close(self) -> None:
        """Abort all reads, including those that wait for a download."""
        ...


class DataError(Exception):
    """A sample whose bytes are missing, damaged or not an image. One line, without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(mask_secrets(message))


def damaged(index: Index, sample: int) -> DataError:
    """Return the error for a sample whose bytes do not have the indexed checksum."""
    return DataError(
        f"{index.shards[index.shard[sample]].name}: the {index.size[sample]} bytes at offset {index.offset[sample]} do "
        "not match the index; restore the shard or index it again"
    )


def require_shards(index: Index) -> None:
    """Raises UserError naming the first local shard that is missing or whose size differs from the index."""
    for shard, (_, size, _) in enumerate(index.shards):
        path = index.location(shard)
        try:
            found = os.stat(path).st_size  # noqa: PTH116, Path would make thousands of objects
        except OSError as error:
            raise UserError(
                f"{path}: shard cannot be opened: {error.strerror}; restore it or index the shards again"
            ) from error
        if found != size:
            raise UserError(
                f"{path}: shard has {found:,} bytes, {size:,} when it was indexed; restore it or index it again"
            )


class LocalStore:
    """Reads shards in place, from a local or mounted folder."""

    def __init__(self, index: Index, checked: bool = False) -> None:
        """`checked`: whether `require_shards` has been called for the index on this host; if not, it is called."""
        self._index = index
        if not checked:
            require_shards(index)
        self._compare_lock = threading.Lock()
        self._mismatched: dict[int, bool] = {}
        # Opening is slow on network file systems, and there may be more shards than a process may open files.
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._file = lru_cache(maxsize=min(max(allowed // 8, 1), 4096))(self._open)

    def read(self, sample: int) -> bytes:
        data = self._read(sample)
        if zlib.crc32(data) != self._index.crc32[sample]:
            shard = int(self._index.shard[sample])
            if self._is_mismatched(shard):
                raise content_mismatch(self._index.location(shard))
            raise damaged(self._index, sample)
        return data

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Do nothing: local reads are fast."""

    def close(self) -> None:
        self._file.cache_clear()

    def _read(self, sample: int) -> bytes:
        index, shard = self._index, int(self._index.shard[sample])
        file = self._file(shard)
        try:
            return os.pread(file.descriptor, int(index.size[sample]), int(index.offset[sample]))
        except OSError as error:
            raise TemporaryError(
                f"{index.location(shard)}: shard cannot be read: {error.strerror}; check its disk or file "
                "server and run again"
            ) from error

    def _is_mismatched(self, shard: int) -> bool:
        """Whether most samples of a shard do not match the index. Only the first call reads the shard."""
        with self._compare_lock:
            if shard not in self._mismatched:
                samples = np.flatnonzero(self._index.shard == shard).tolist()
                changed = sum(zlib.crc32(self._read(sample)) != self._index.crc32[sample] for sample in samples)
                self._mismatched[shard] = changed > len(samples) / 2
            return self._mismatched[shard]

    def _open(self, shard: int) -> "_File":
        path = self._index.location(shard)
        try:
            return _File(path)
        except OSError as error:
            raise UserError(
                f"{path}: shard cannot be opened: {error.strerror}; restore it and run again", scope="rank"
            ) from error


class _File:
    """A descriptor closed with its last reference: another thread may still read a file dropped from the cache."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
