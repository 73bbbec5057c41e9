"""Benchmark of data loaders: ours, webdataset with a DataLoader, DALI's WebDataset reader, and decoding only."""

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

from distrain.bench.rounds import Rate, measure_interleaved
from distrain.config import AugmentConfig, DataConfig, DownloadConfig
from distrain.data.augmentation.crops import draw_crop_boxes
from distrain.data.index import Index, is_remote
from distrain.data.loading.jpeg_region import crop, decode, resize
from distrain.data.loading.loader import Loader, Request
from distrain.data.loading.loaders import LOADERS, open_loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.shards.members import IMAGE_SUFFIXES
from distrain.data.storage.remote import open_store
from distrain.errors import UserError

DECODE = "decode only"
WEBDATASET = "webdataset + DataLoader"
DALI = "DALI's WebDataset reader"
STAGES = ("read and verify checksum", "decode crop box", "resize and flip", "copy to batch")
_AUGMENT = AugmentConfig()
_SUFFIXES = ";".join(suffix[1:] for suffix in IMAGE_SUFFIXES)


def bench_loaders(
    index: Index, data: DataConfig, images: int, batch: int, rounds: int, device: torch.device
) -> tuple[list[Rate], dict[str, float]]:
    """Return images per second of all candidates on the first `images` readable images, and a profile of our torch
    loader: single-thread microseconds per image in each stage.

    DALI's reader cannot skip images, so it is measured only if all are readable. Raises UserError if shards are
    remote, as the other libraries need local ones, or contain no readable image.
    """
    if any(is_remote(index.location(shard)) for shard in range(len(index.shards))):
        raise UserError("bench loader needs local shards: download and index them first")
    readable = np.flatnonzero(index.width)
    if not len(readable):
        raise UserError(f"{data.train}: none of its {len(index):,} images was readable when it was indexed")
    ids = readable[np.arange(images) % len(readable)]
    with open_loaders(index, data, batch, device) as loaders:
        candidates: dict[str, Callable[[], int]] = {DECODE: decode_candidate(index, data, ids)}
        for name, loader in loaders.items():
            candidates[f"distrain, {name}"] = loader_candidate(loader, index, data, ids, batch)
        candidates[WEBDATASET] = webdataset_candidate(index, data, images, batch)
        if len(readable) == len(index):
            candidates[DALI] = dali_candidate(index, data, images, batch, device)
        return measure_interleaved(candidates, rounds), profile(index, data, ids)


@contextmanager
def open_loaders(index: Index, data: DataConfig, batch: int, device: torch.device) -> Iterator[dict[str, Loader]]:
    """Open each of our loaders on the same data, by name."""
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


def loader_candidate(loader: Loader, index: Index, data: DataConfig, ids: np.ndarray, batch: int) -> Callable[[], int]:
    """Return a candidate that uses one of our loaders as training does."""

    def work() -> int:
        return sum(len(result.labels) for result in loader.stream(requests(index, data, ids, batch)))

    return work


def requests(index: Index, data: DataConfig, ids: np.ndarray, batch: int) -> Iterator[Request]:
    """Yield requests for `ids` in batches, cropped as in training."""
    for start in range(0, len(ids), batch):
        selected = ids[start : start + batch]
        samples = LaneBatch(selected, np.zeros_like(selected), np.zeros_like(selected))
        crops = draw_crop_boxes(_AUGMENT, data, 0, samples, index.width[selected], index.height[selected])
        yield Request(samples, crops, data.image_size)


def decode_candidate(index: Index, data: DataConfig, ids: np.ndarray) -> Callable[[], int]:
    """Return the upper bound: a candidate that only decodes images held in memory, with the same number of threads."""
    store = open_store(index, DownloadConfig())
    encoded = [store.read(int(sample)) for sample in ids]
    store.close()

    def work() -> int:
        with ThreadPoolExecutor(data.threads) as pool:
            return sum(image.shape[0] // 3 for image in pool.map(decode, encoded))

    return work


def webdataset_candidate(index: Index, data: DataConfig, images: int, batch: int) -> Callable[[], int]:
    """Return a candidate built as webdataset documents it: a pipeline over tars, decoded by torchvision in workers."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = [index.location(shard) for shard in range(len(index.shards))]

    def transform(encoded: bytes) -> torch.Tensor:
        full = decode(encoded)
        top, left, height, width = RandomResizedCrop.get_params(full, _AUGMENT.crop_scale, _AUGMENT.crop_ratio)
        image = F.resized_crop(full, top, left, height, width, [data.image_size] * 2, antialias=True)
        return F.horizontal_flip(image) if torch.rand(()) < _AUGMENT.flip else image

    # Every worker repeats all shards until it has its share of a round, so the shard count need not divide evenly.
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .to_tuple(_SUFFIXES, handler=webdataset.ignore_and_continue)
        .map_tuple(transform, handler=webdataset.ignore_and_continue)
        .batched(batch)
        .with_epoch(max(1, images // batch // data.threads))
    )
    loader = DataLoader(dataset, batch_size=None, num_workers=data.threads, prefetch_factor=4, persistent_workers=True)

    def work() -> int:
        return sum(len(decoded) for (decoded,) in loader)

    return work


def dali_candidate(index: Index, data: DataConfig, images: int, batch: int, device: torch.device) -> Callable[[], int]:
    """Return a candidate of DALI only: its WebDataset reader, decoder and augmentation."""
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

    def consume() -> None:
        pipeline.share_outputs()
        pipeline.release_outputs()

    pipeline.schedule_run()  # the first call produces two batches, later calls one
    consume()
    consume()

    def work() -> int:
        """Keep one batch in flight, and none while other candidates run."""
        batches = -(-images // batch)
        pipeline.schedule_run()
        for _ in range(batches - 1):
            pipeline.schedule_run()
            consume()
        consume()
        return batches * batch

    return work


def profile(index: Index, data: DataConfig, ids: np.ndarray) -> dict[str, float]:
    """Return single-thread microseconds per image in each stage of our torch loader."""
    store = open_store(index, DownloadConfig())
    samples = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
    *boxes, flips = draw_crop_boxes(_AUGMENT, data, 0, samples, index.width[ids], index.height[ids])
    batch = np.empty((32, data.image_size, data.image_size, 3), np.uint8)
    times: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for position, sample in enumerate(ids.tolist()):
        marks = [time.perf_counter()]
        encoded = store.read(sample)
        marks.append(time.perf_counter())
        image = crop(
            encoded, int(index.height[sample]), int(index.width[sample]), *(int(box[position]) for box in boxes)
        )
        marks.append(time.perf_counter())
        image = resize(image, data.image_size, data.interpolation, bool(flips[position]))
        marks.append(time.perf_counter())
        batch[position % len(batch)] = image
        marks.append(time.perf_counter())
        for stage, seconds in zip(STAGES, np.diff(marks).tolist(), strict=True):
            times[stage] += 1e6 * seconds / len(ids)
    store.close()
    return times
