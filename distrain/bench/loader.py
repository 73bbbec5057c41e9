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
from distrain.config import AugmentConfig, DataConfig, DownloadConfig
from distrain.data.augmentation.crops import draw_crop_boxes
from distrain.data.index import Index, is_remote
from distrain.data.loading.jpeg_region import crop, decode, resize
from distrain.data.loading.loader import Loader, Request
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.loading.setup import LOADERS, open_loader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.shards.scan import IMAGE_SUFFIXES
from distrain.data.storage.remote import open_store
from distrain.errors import UserError

DECODE = "decode alone"
WEBDATASET = "webdataset + DataLoader"
DALI = "DALI's WebDataset reader"
PARTS = ("read and checksum", "decode the window", "resize and mirror", "put into the batch")
_AUGMENT = AugmentConfig()
_SUFFIXES = ";".join(suffix[1:] for suffix in IMAGE_SUFFIXES)


def bench_loaders(
    index: Index, data: DataConfig, images: int, batch: int, rounds: int, device: torch.device
) -> tuple[list[Rate], dict[str, float]]:
    """Images per second of all contestants on the first `images` readable ones of the shards, and where the time
    goes: microseconds of one thread per image in each part of our torch loader.

    DALI's reader takes part only if it can read every image, as it cannot pass over one. Raises UserError if the
    shards are not on this machine, which is where the peers can read them too, or hold no readable image.
    """
    if any(is_remote(index.location(shard)) for shard in range(len(index.shards))):
        raise UserError("bench loader compares with peers on local shards: download them and index them there")
    readable = np.flatnonzero(index.width)
    if not len(readable):
        raise UserError(f"{data.train}: none of its {len(index):,} images could be read when they were indexed")
    ids = readable[np.arange(images) % len(readable)]
    with ours(index, data, batch, device) as loaders:
        candidates: dict[str, Callable[[], int]] = {DECODE: decoding(index, data, ids)}
        for name, loader in loaders.items():
            candidates[f"distrain, {name}"] = loading(loader, index, data, ids, batch)
        candidates[WEBDATASET] = peer_webdataset(index, data, images, batch)
        if len(readable) == len(index):
            candidates[DALI] = peer_dali(index, data, images, batch, device)
        return measure_in_turns(candidates, rounds), profile(index, data, ids)


@contextmanager
def ours(index: Index, data: DataConfig, batch: int, device: torch.device) -> Iterator[dict[str, Loader]]:
    """Each of our loaders, over the same data."""
    with TemporaryDirectory() as folder:
        loaders = {}
        for name in LOADERS:
            quarantine = Quarantine(Path(folder) / name, "train", len(index), 1.0)
            source = SampleReader(index, open_store(index, DownloadConfig()), quarantine)
            loaders[name] = open_loader(name, data, _AUGMENT, 0, batch, source, device)
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
        crops = draw_crop_boxes(_AUGMENT, data, 0, samples, index.width[part], index.height[part])
        yield Request(samples, crops, data.image_size)


def decoding(index: Index, data: DataConfig, ids: np.ndarray) -> Callable[[], int]:
    """The limit: images that lie in memory are decoded and thrown away, by as many threads."""
    store = open_store(index, DownloadConfig())
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
        top, left, height, width = RandomResizedCrop.get_params(whole, _AUGMENT.crop_scale, _AUGMENT.crop_ratio)
        image = F.resized_crop(whole, top, left, height, width, [data.image_size] * 2, antialias=True)
        return F.horizontal_flip(image) if torch.rand(()) < _AUGMENT.flip else image

    # Every worker reads all shards, again and again, until it has its part of a round: few shards need not divide.
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .to_tuple(_SUFFIXES, handler=webdataset.ignore_and_continue)
        .map_tuple(transform, handler=webdataset.ignore_and_continue)
        .batched(batch)
        .with_epoch(max(1, images // batch // data.threads))
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=data.threads, prefetch_factor=4, persistent_workers=True)

    def work() -> int:
        seen = 0
        for (decoded,) in loader:
            seen += len(decoded)
        return seen

    return work


def peer_dali(index: Index, data: DataConfig, images: int, batch: int, device: torch.device) -> Callable[[], int]:
    """DALI's own way with WebDataset: it reads, shuffles, crops and decodes by itself."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def
    def graph() -> Any:
        encoded = fn.readers.webdataset(
            paths=[index.location(shard) for shard in range(len(index.shards))],
            ext=[_SUFFIXES],
            case_sensitive_extensions=False,
            missing_component_behavior="error",
        )
        images = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if gpu else "cpu",
            random_area=_AUGMENT.crop_scale,
            random_aspect_ratio=_AUGMENT.crop_ratio,
        )
        images = fn.resize(images, size=[data.image_size] * 2, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip(probability=_AUGMENT.flip))

    pipeline = graph(
        batch_size=batch, num_threads=data.threads, device_id=device.index if gpu else None, prefetch_queue_depth=2
    )
    pipeline.build()

    def take() -> None:
        pipeline.share_outputs()
        pipeline.release_outputs()

    pipeline.schedule_run()  # the first time it makes two batches, later one
    take()
    take()

    def work() -> int:
        """One batch is always under way, and none when the others have their turn."""
        batches = -(-images // batch)
        pipeline.schedule_run()
        for _ in range(batches - 1):
            pipeline.schedule_run()
            take()
        take()
        return batches * batch

    return work


def profile(index: Index, data: DataConfig, ids: np.ndarray) -> dict[str, float]:
    """Microseconds per image of one thread in the parts of our torch loader."""
    store = open_store(index, DownloadConfig())
    samples = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
    *boxes, flips = draw_crop_boxes(_AUGMENT, data, 0, samples, index.width[ids], index.height[ids])
    batch = np.empty((32, data.image_size, data.image_size, 3), np.uint8)
    times: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for place, sample in enumerate(ids.tolist()):
        began = [time.perf_counter()]
        encoded = store.read(sample)
        began.append(time.perf_counter())
        image = crop(encoded, int(index.height[sample]), int(index.width[sample]), *(int(w[place]) for w in boxes))
        began.append(time.perf_counter())
        image = resize(image, data.image_size, data.interpolation, bool(flips[place]))
        began.append(time.perf_counter())
        batch[place % len(batch)] = image
        began.append(time.perf_counter())
        for part, seconds in zip(PARTS, np.diff(began).tolist(), strict=True):
            times[part] += 1e6 * seconds / len(ids)
    store.close()
    return times
