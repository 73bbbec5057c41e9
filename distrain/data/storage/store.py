"""The bytes of one sample, from wherever the shards lie."""

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


class Store(Protocol):
    """Hands out encoded images by sample id, from any thread."""

    def read(self, sample: int) -> bytes:
        """Raises DataError naming the shard when the bytes are not those of the index, UserError when the whole
        shard is missing or another, TemporaryError when it cannot be read just now."""
        ...

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Announce samples that will be read later, the sooner ones first. Returns at once."""
        ...

    def close(self) -> None:
        """Give up all reads, also those that wait for a download."""
        ...


class DataError(Exception):
    """A sample whose bytes are missing, damaged or not an image."""


def damaged(index: Index, sample: int) -> DataError:
    """What to raise for bytes that do not have the checksum of the index."""
    return DataError(
        f"{index.shards[index.shard[sample]].name}: the {index.size[sample]} bytes at {index.offset[sample]} are not "
        "those that were indexed; restore the shard or index it again"
    )


class LocalStore:
    """Shards in a local or mounted folder, read in place."""

    def __init__(self, index: Index) -> None:
        """Raises UserError naming the first shard that is missing or not as long as it was indexed."""
        self._index = index
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
                    f"{path}: shard of {found:,} bytes had {size:,} when it was indexed; restore it or index it again"
                )
        self._comparing = threading.Lock()
        self._others: dict[int, bool] = {}
        # Opening is slow on network file systems, and there may be more shards than a process may open files.
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._file = lru_cache(maxsize=min(max(allowed // 8, 1), 4096))(self._open)

    def read(self, sample: int) -> bytes:
        data = self._read(sample)
        if zlib.crc32(data) != self._index.crc32[sample]:
            shard = int(self._index.shard[sample])
            if self._is_another(shard):
                raise content_mismatch(self._index.location(shard))
            raise damaged(self._index, sample)
        return data

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Nothing to do: reads are near."""

    def close(self) -> None:
        self._file.cache_clear()

    def _read(self, sample: int) -> bytes:
        index, shard = self._index, int(self._index.shard[sample])
        file = self._file(shard)
        try:
            return os.pread(file.descriptor, int(index.size[sample]), int(index.offset[sample]))
        except OSError as error:
            raise TemporaryError(
                f"{index.location(shard)}: shard cannot be read: {error.strerror}; see that its disk or file server "
                "works and run again"
            ) from error

    def _is_another(self, shard: int) -> bool:
        """Whether most samples of a shard are not those that were indexed. Only the first call reads it."""
        with self._comparing:
            if shard not in self._others:
                samples = np.flatnonzero(self._index.shard == shard).tolist()
                changed = sum(zlib.crc32(self._read(sample)) != self._index.crc32[sample] for sample in samples)
                self._others[shard] = changed > len(samples) / 2
            return self._others[shard]

    def _open(self, shard: int) -> "_File":
        path = self._index.location(shard)
        try:
            return _File(path)
        except OSError as error:
            raise UserError(
                f"{path}: shard cannot be opened: {error.strerror}; restore it and run again", scope="rank"
            ) from error


class _File:
    """A file that is open until nobody holds it any more: one thread may still read what another has put aside."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
