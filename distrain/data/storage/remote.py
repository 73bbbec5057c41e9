"""Remote shards: downloaded whole, once per node and in advance, to a cache of bounded size."""

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
from distrain.data.storage.download import Downloader, DownloadError, StoreClosed
from distrain.data.storage.private import create_tmp_folder
from distrain.data.storage.retry import RetryPolicy
from distrain.data.storage.store import LocalStore, Store, damaged, require_shards
from distrain.errors import UserError
from distrain.masking import mask_urls


class RemoteStore:
    """Reads shards from the cache in `download.cache`, downloading them in advance or, at the latest, on demand."""

    def __init__(self, index: Index, download: DownloadConfig) -> None:
        """Raises UserError when the largest shard exceeds `download.cache_gb`."""
        limit = round(download.cache_gb * 1e9)
        largest = max(index.shards, key=lambda shard: shard.size)
        if largest.size > limit:
            raise UserError(
                f"download.cache_gb={download.cache_gb:g} cannot hold {largest.name} of {largest.size / 1e9:.3g} GB: "
                "raise it to at least a few shards per rank"
            )
        self._index = index
        self._closing = threading.Event()
        policy = RetryPolicy(download.retries, download.retry_wait)
        self._downloader = Downloader(policy, download.timeout, self._closing)
        self._cache = ShardCache(cache_folder(download), limit, self._closing)
        self._names = [self._name(shard) for shard in range(len(index.shards))]
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._pending: set[int] = set()
        self._workers = [
            threading.Thread(target=self._download_queued, name="download", daemon=True)
            for _ in range(download.parallel)
        ]
        for worker in self._workers:
            worker.start()

    def read(self, sample: int) -> bytes:
        """Return the encoded image, after downloading its shard if necessary.

        Raises DataError when the bytes do not match the index although the shard does, UserError for a shard that the
        user has to provide, DownloadError for one that could not be downloaded, StoreClosed.
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
        """Download the shards of these samples in the background, in the order of the samples."""
        for shard in dict.fromkeys(self._index.shard[samples].tolist()):
            if shard not in self._pending and not self._cache.touch(self._names[shard]):
                self._pending.add(shard)
                self._queue.put(shard)

    def close(self) -> None:
        """Abort all downloads; reads that wait for them raise StoreClosed."""
        self._closing.set()
        for _ in self._workers:
            self._queue.put(-1)
        for worker in self._workers:
            worker.join(timeout=1)  # daemons: one blocked by a silent server ends with the process

    def _download_queued(self) -> None:
        while not self._closing.is_set() and (shard := self._queue.get()) >= 0:
            # The read that needs the shard tries again and reports the error.
            with suppress(UserError, DownloadError, StoreClosed):
                self._cache.fetch(self._names[shard], self._index.shards[shard].size, partial(self._download, shard))
            self._pending.discard(shard)

    def _download(self, shard: int, write: Write) -> None:
        _, size, crc32 = self._index.shards[shard]
        self._downloader.fetch(self._index.location(shard), size, crc32, write)

    def _name(self, shard: int) -> str:
        """Return the shard's name in the cache: it depends on the content, so old and new data can share it, and not
        on credentials in the URL."""
        _, size, crc32 = self._index.shards[shard]
        return sha256(f"{mask_urls(self._index.location(shard))} {size} {crc32}".encode()).hexdigest()[:24]


def open_store(index: Index, download: DownloadConfig, checked: bool = False) -> Store:
    """Open a store for local or remote shards. Raises UserError when they cannot be used.

    `checked`: whether `check_store` has been called for the index on this host.
    """
    return RemoteStore(index, download) if index.remote else LocalStore(index, checked)


def check_store(index: Index) -> None:
    """Look at all local shards. Raises UserError for one that cannot be used."""
    if not index.remote:
        require_shards(index)


def cache_folder(download: DownloadConfig) -> Path:
    """Return the folder of downloaded shards, by default one per user below TMPDIR, which is then created.

    Raises UserError if that one is not this user's alone.
    """
    if download.cache:
        return Path(download.cache).expanduser()
    try:
        return create_tmp_folder("shards", "remove it, or set download.cache to another folder")
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot cache shards: {error.strerror}; set download.cache to another folder",
            scope="rank",
        ) from error
