"""Processes that share one cache, as the ranks of a node do."""

import multiprocessing
from pathlib import Path

import numpy as np

from distrain.config import DownloadConfig
from distrain.data.storage.index_file import load_index
from distrain.data.storage.remote import open_store
from distrain.data.storage.store import Store

SPAWN = multiprocessing.get_context("spawn")


def open_at(url: str, cache: Path, **settings) -> Store:
    """Open a store on the training shards at a URL."""
    defaults = {"cache_gb": 1.0, "retries": 3, "retry_wait": 0.01, "timeout": 5.0}
    download = DownloadConfig(cache=str(cache), **(defaults | settings))
    return open_store(load_index(f"{url}/train.parquet"), download)


def start_readers(count: int, url: str, cache: Path, samples: int, **settings) -> list:
    """Start processes that each read every sample once, each in a different order."""
    readers = [SPAWN.Process(target=_read, args=(url, cache, seed, samples, settings)) for seed in range(count)]
    for reader in readers:
        reader.start()
    return readers


def start_reader_of(sample: int, url: str, cache: Path):
    """Start a process that reads one sample, with a long timeout."""
    reader = SPAWN.Process(target=_read_one, args=(url, cache, sample))
    reader.start()
    return reader


def exit_codes(readers: list) -> list[int | None]:
    for reader in readers:
        reader.join(60)
    return [reader.exitcode for reader in readers]


def _read(url, cache, seed, samples, settings):
    store = open_at(url, cache, **settings)
    for sample in np.random.default_rng(seed).permutation(samples).tolist():
        store.read(sample)
    store.close()


def _read_one(url, cache, sample):
    open_at(url, cache, timeout=20.0).read(sample)
