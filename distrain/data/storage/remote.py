"""Shards behind URLs: downloaded whole, once per node, ahead of need, into a bounded cache."""

import os
import tempfile
import threading
import zlib
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from distrain.config import DownloadConfig
from distrain.data.index import Index
from distrain.data.storage.cache import ShardCache, Write
from distrain.data.storage.download import Closed, Downloader, DownloadError
from distrain.data.storage.store import LocalStore, Store, damaged
from distrain.errors import UserError


class RemoteStore:
    """Reads shards that are downloaded to `download.cache` ahead of need, or else when they are needed."""

    def __init__(self, index: Index, download: DownloadConfig) -> None:
        """Raises UserError when no cache within the bound can hold the shards."""
        limit = round(download.cache_gb * 1e9)
        largest = max(index.shards, key=lambda shard: shard.size)
        if largest.size > limit:
            raise UserError(
                f"download.cache_gb={download.cache_gb:g} cannot hold {largest.name} of {largest.size / 1e9:.3g} GB: "
                "raise it, to some shards for each rank at the least"
            )
        self._index = index
        self._closing = threading.Event()
        self._transfer = Downloader(download.retries, download.retry_wait, download.timeout, self._closing)
        self._cache = ShardCache(cache_folder(download), limit, self._closing)
        self._names = [self._name(shard) for shard in range(len(index.shards))]
        self._announced: SimpleQueue[int] = SimpleQueue()
        self._waiting: set[int] = set()
        self._workers = [
            threading.Thread(target=self._download_announced, name="download", daemon=True)
            for _ in range(download.parallel)
        ]
        for worker in self._workers:
            worker.start()

    def read(self, sample: int) -> bytes:
        """The encoded image; waits for its shard if need be.

        Raises DataError when the bytes are not those of the index though its shard is, UserError for a shard that
        only the user can bring, TransferError for one that could not be had.
        """
        index, shard = self._index, int(self._index.shard[sample])
        for _ in range(2):
            data = self._cache.read(
                self._names[shard], index.shards[shard].size, int(index.offset[sample]), int(index.size[sample]),
                partial(self._download, shard),
            )  # fmt: skip
            if zlib.crc32(data) == index.crc32[sample]:
                return data
            if not self._cache.remove_damaged(self._names[shard], *index.shards[shard][1:]):
                break
        raise damaged(index, sample)

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Download the shards of these samples in the background, in the order in which they come."""
        for shard in dict.fromkeys(self._index.shard[samples].tolist()):
            if shard not in self._waiting and not self._cache.touch(self._names[shard]):
                self._waiting.add(shard)
                self._announced.put(shard)

    def close(self) -> None:
        """End all downloads and whatever waits for them, which raises Closed there."""
        self._closing.set()
        for _ in self._workers:
            self._announced.put(-1)
        for worker in self._workers:
            worker.join(timeout=1)  # one that a silent server holds up dies with the process

    def _download_announced(self) -> None:
        while not self._closing.is_set() and (shard := self._announced.get()) >= 0:
            # Whoever needs the shard tries again and says what is wrong.
            with suppress(UserError, DownloadError, Closed):
                self._cache.fetch(self._names[shard], self._index.shards[shard].size, partial(self._download, shard))
            self._waiting.discard(shard)

    def _download(self, shard: int, write: Write) -> None:
        _, size, crc32 = self._index.shards[shard]
        self._transfer.fetch(self._index.location(shard), size, crc32, write)

    def _name(self, shard: int) -> str:
        """Name in the cache: another for another content, so that runs on old and new data can share a cache."""
        _, size, crc32 = self._index.shards[shard]
        return sha256(f"{self._index.location(shard)} {size} {crc32}".encode()).hexdigest()[:24]


def open_store(index: Index, download: DownloadConfig) -> Store:
    """A store that suits the place of the shards. Raises UserError when they cannot be used."""
    return RemoteStore(index, download) if index.remote else LocalStore(index)


def cache_folder(download: DownloadConfig) -> Path:
    default = Path(tempfile.gettempdir()) / f"distrain-{os.getuid()}" / "shards"
    return Path(download.cache).expanduser() if download.cache else default
