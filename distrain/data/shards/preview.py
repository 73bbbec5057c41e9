"""Preview an index: a summary in numbers, and a contact sheet of samples."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from distrain import config
from distrain.config import BatchConfig, Config, DataConfig, RunConfig
from distrain.data.index import Index
from distrain.sheet import write_sheet

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)
_LISTED_CLASSES = 20  # up to this number, classes are listed individually
_BAR = 40
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = " 12345678"


def summarize(index: Index) -> Iterator[str]:
    """Yield lines about the whole index, its images, classes and shards."""
    stored = sum(shard.size for shard in index.shards)
    yield (
        f"{len(index):,} images, {len(index.classes):,} classes, {len(index.shards):,} shards, "
        f"{decimal(stored)}, digest {index.digest}"
    )
    unreadable = int(np.count_nonzero(index.width == 0))
    if unreadable:
        yield f"{unreadable:,} of the images could not be decoded when they were indexed; training will skip them"
    yield ""
    yield "images" + "".join(f"{_quantile_name(q):>10}" for q in _QUANTILES) + f"{'mean':>10}"
    readable = index.width > 0
    yield from (
        _quantile_line(name, values[readable])
        for name, values in (("width", index.width), ("height", index.height), ("bytes", index.size))
    )
    yield ""
    yield from _summarize_classes(index)
    yield ""
    yield from _summarize_shards(index)


def draw_sheet(index_path: str, index: Index, path: Path, config_file: str | None, count: int) -> None:
    """Write a PNG of the first `count` samples of training on this index, as the network will see them.

    Order, crops and augmentation are those of the configuration's data section and seed, with one lane. Raises
    UserError.
    """
    from torch import device

    from distrain.data.loading.requests import train_requests
    from distrain.data.loading.setup import make_loader, make_plan, make_quarantine

    count = min(count, len(index))
    with TemporaryDirectory() as folder:
        run = _sheet_config(index_path, config_file, count, folder)
        requests = train_requests(run, make_plan(run, index), index, range(1))
        quarantine = make_quarantine(run, index, "train")
        with closing(make_loader(run, "torch", index, quarantine, device("cpu"))) as loader:
            stream = loader.stream(requests)
            batch = next(stream)
            stream.close()
    pixels = batch.images.permute(0, 2, 3, 1).numpy()
    labels = [row.nonzero()[:, 0] if index.multi_label else row[None] for row in batch.labels]
    names = [", ".join(index.classes[label] for label in row.tolist()) for row in labels]
    write_sheet(path, list(pixels), names)


def _sheet_config(index_path: str, config_file: str | None, count: int, folder: str) -> Config:
    """Return the configuration of a run with one lane that tolerates any number of bad samples."""
    batch = BatchConfig(lanes=1, per_lane=max(count, 2))
    if config_file is None:
        data = DataConfig(train=index_path, val=index_path, max_bad=1.0)
        return Config(run=RunConfig(name="sheet", dir=folder), data=data, batch=batch)
    settings = [f"data.train={index_path}", f"data.val={index_path}", "data.max_bad=1"]
    return replace(config.load(config_file, [*settings, "run.name=sheet", f"run.dir={folder}"]), batch=batch)


def _quantile_name(percent: int) -> str:
    return {0: "min", 50: "median", 100: "max"}.get(percent, f"{percent}%")


def _quantile_line(name: str, values: NDArray[Any]) -> str:
    if not len(values):
        return f"{name:<6}  no readable images"
    numbers = [*np.percentile(values, _QUANTILES), values.mean()]
    return f"{name:<6}" + "".join(f"{number:>10,.0f}" for number in numbers)


def _summarize_classes(index: Index) -> Iterator[str]:
    if index.multi_label:
        labels = (index.label >= 0).sum(axis=1)
        yield f"labels per image: {labels.min():,} to {labels.max():,}, mean {labels.mean():.2f}"
    counts = index.class_counts()
    empty = int(np.count_nonzero(counts == 0))
    yield (
        f"images per class: {counts.min():,} to {counts.max():,}, median {np.median(counts):,.0f}"
        + (f"; {empty:,} classes have none" if empty else "")
    )
    if len(counts) <= _LISTED_CLASSES:
        width = max(len(name) for name in index.classes)
        for name, count in zip(index.classes, counts, strict=True):
            yield f"  {name:<{width}} {count:>9,} " + _drawable("█", "#") * round(_BAR * count / counts.max())
        return
    groups = np.array_split(counts, 2 * _BAR)
    scale = _drawable(_LEVELS, _ASCII_LEVELS)
    levels = [int(np.ceil(group.mean() / counts.max() * (len(_LEVELS) - 1))) for group in groups if len(group)]
    yield "  by label, scaled to the largest class: " + "".join(scale[level] for level in levels)
    order = np.argsort(counts, kind="stable")
    for kind, some in (("fewest", order[:5]), ("most", order[:-6:-1])):
        yield f"  {kind}: " + ", ".join(f"{index.classes[label]} {counts[label]:,}" for label in some)


def _drawable(characters: str, ascii_ones: str) -> str:
    """Return the characters, or others for a terminal without them."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ascii_ones
    return characters


def _summarize_shards(index: Index) -> Iterator[str]:
    sizes = np.array([shard.size for shard in index.shards])
    counts = np.bincount(index.shard, minlength=len(sizes))
    yield (
        f"shards: {decimal(int(sizes.min()))} to {decimal(int(sizes.max()))}, "
        f"{counts.min():,} to {counts.max():,} images"
    )
    yield f"  {index.location(0)}"
    if len(sizes) > 1:
        yield f"  ... to {index.location(len(sizes) - 1)}"
