"""Loaders: ours, webdataset with a DataLoader, DALI's own reader of WebDataset, and decoding alone."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from distrain.bench.rounds import Rate, measure_in_turns
from distrain.config import DataConfig
from distrain.data.augment import Windows, draw_windows
from distrain.data.index import Index
from distrain.data.loader import Loader, Request
from distrain.data.loaders import LOADERS, open_loader
from distrain.data.loaders.parts import decode
from distrain.data.plan import LaneBatch
from distrain.data.quarantine import Quarantine
from distrain.data.remote import open_store
from distrain.data.source import Source
from distrain.errors import UserError

DECODE = "decode alone"
WEBDATASET = "webdataset + DataLoader"


def bench_loaders(
    index: Index, data: DataConfig, images: int, batch: int, rounds: int, device: torch.device
) -> tuple[list[Rate], dict[str, float]]:
    """Images per second of all contestants on the first `images` of the shards, and where the time goes:
    microseconds of one thread per image in each part of our torch loader.

    Raises UserError if the shards are not on this machine, which is where the peers can read them too.
    """
    if any("://" in index.location(shard) for shard in range(len(index.shards))):
        raise UserError("bench loader compares with peers on local shards: download them and index them there")
    ids = np.arange(images) % len(index)
    with ours(index, data, batch, device) as loaders:
        contestants: dict[str, Callable[[], int]] = {DECODE: decoding(index, data, ids)}
        for name, loader in loaders.items():
            contestants[f"distrain, {name}"] = loading(loader, index, data, ids, batch)
        contestants[WEBDATASET] = peer_webdataset(index, data, images, batch)
        contestants["DALI's WebDataset reader"] = peer_dali(index, data, images, batch, device)
        return measure_in_turns(contestants, rounds), profile(index, data, ids)


@contextmanager
def ours(index: Index, data: DataConfig, batch: int, device: torch.device) -> Iterator[dict[str, Loader]]:
    """Each of our loaders, over the same data."""
    with TemporaryDirectory() as folder:
        loaders = {}
        for name in LOADERS:
            quarantine = Quarantine(Path(folder) / name, "train", len(index), 1.0)
            source = Source(index, open_store(index, data), quarantine)
            loaders[name] = open_loader(name, data, 0, batch, source, device)
        try:
            yield loaders
        finally:
            for loader in loaders.values():
                loader.close()


def loading(loader: Loader, index: Index, data: DataConfig, ids: np.ndarray, batch: int) -> Callable[[], int]:
    """What training does with a loader."""

    def work() -> int:
        return sum(len(done.labels) for done in loader.stream(requests(index, data, ids, batch)))

    return work


def requests(index: Index, data: DataConfig, ids: np.ndarray, batch: int) -> Iterator[Request]:
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        samples = LaneBatch(part, np.zeros_like(part), np.zeros_like(part))
        windows = draw_windows(data, 0, samples, index.width[part], index.height[part])
        yield Request(samples, windows, data.image_size)


def decoding(index: Index, data: DataConfig, ids: np.ndarray) -> Callable[[], int]:
    """The limit: images that lie in memory are decoded and thrown away, by as many threads."""
    store = open_store(index, data)
    encoded = [store.read(int(sample)) for sample in ids]
    store.close()

    def work() -> int:
        with ThreadPoolExecutor(data.threads) as pool:
            return sum(image.shape[0] // 3 for image in pool.map(decode, encoded))

    return work


def peer_webdataset(index: Index, data: DataConfig, images: int, batch: int) -> Callable[[], int]:
    """What webdataset's documentation builds: a pipeline of tars, decoded by torchvision in worker processes."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = [index.location(shard) for shard in range(len(index.shards))]

    def transform(encoded: bytes) -> torch.Tensor:
        whole = decode(encoded)
        top, left, height, width = RandomResizedCrop.get_params(whole, data.crop_scale, data.crop_ratio)
        image = F.resized_crop(whole, top, left, height, width, [data.image_size] * 2, antialias=True)
        return F.horizontal_flip(image) if torch.rand(()) < data.flip else image

    # Every worker reads all shards, again and again, until it has its part of a round: few shards need not divide.
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(transform, int)
        .batched(batch)
        .with_epoch(max(1, images // batch // data.threads))
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=data.threads, prefetch_factor=4, persistent_workers=True)

    def work() -> int:
        seen = 0
        for _, labels in loader:
            seen += len(labels)
        return seen

    return work


def peer_dali(index: Index, data: DataConfig, images: int, batch: int, device: torch.device) -> Callable[[], int]:
    """DALI's own way with WebDataset: it reads, shuffles, crops and decodes by itself."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def
    def graph() -> Any:
        encoded, label = fn.readers.webdataset(  # type: ignore[misc]
            paths=[index.location(shard) for shard in range(len(index.shards))],
            ext=["jpg;jpeg;png", "cls"],
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if gpu else "cpu",
            random_area=data.crop_scale,
            random_aspect_ratio=data.crop_ratio,
        )
        images = fn.resize(images, size=[data.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=data.flip)), label

    pipeline = graph(batch_size=batch, num_threads=data.threads, device_id=device.index if gpu else None)
    pipeline.build()

    def work() -> int:
        batches = -(-images // batch)
        for _ in range(batches):
            pipeline.run()
        return batches * batch

    return work


def profile(index: Index, data: DataConfig, ids: np.ndarray) -> dict[str, float]:
    """Microseconds per image of one thread in reading, decoding, cutting and resizing."""
    store = open_store(index, data)
    encoded = timed(lambda sample: store.read(int(sample)), ids)
    store.close()
    images = timed(decode, encoded.results)
    samples = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
    windows = draw_windows(data, 0, samples, index.width[ids], index.height[ids])
    cut = timed(lambda place: _cut(images.results[place], windows, place), range(len(ids)))
    resized = timed(lambda image: F.resize(image, [data.image_size] * 2, antialias=True), cut.results)
    parts = {"read and checksum": encoded, "decode": images, "cut": cut, "resize": resized}
    return {name: part.microseconds for name, part in parts.items()}


class timed:  # noqa: N801, reads as a verb
    """Results of a function over many arguments, and microseconds it took for each."""

    def __init__(self, function: Callable[[Any], Any], arguments: Any) -> None:
        began = time.perf_counter()
        self.results = [function(argument) for argument in arguments]
        self.microseconds = 1e6 * (time.perf_counter() - began) / len(self.results)


def _cut(image: torch.Tensor, windows: Windows, place: int) -> torch.Tensor:
    return F.crop(image, *(int(part[place]) for part in windows[:4]))
