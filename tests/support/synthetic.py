"""Shards of small synthetic images."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import save_index

CLASSES = ["red", "green", "blue"]


def write_split(folder: Path, split: str, count: int, shards: int, size: int = 8) -> None:
    rng = np.random.default_rng(count)
    names = [f"{split}-{number:06d}.tar" for number in range(shards)]
    for name, samples in zip(names, np.array_split(np.arange(count), shards), strict=True):
        with TarWriter(str(folder / name)) as writer:
            for number in samples:
                label = int(rng.integers(len(CLASSES)))
                pixels = rng.integers(0, 200, (size, size, 3), dtype=np.uint8)
                pixels[..., label] += 55
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                writer.write({"__key__": f"{number:06d}", "png": png.getvalue(), "cls": label})
    save_index(scan(str(folder), names, CLASSES), folder / f"{split}.parquet")


def write_multi_label_split(folder: Path, split: str, count: int, shards: int, size: int = 8) -> None:
    """The same with any number of colors per image, also none, in .json."""
    rng = np.random.default_rng(count)
    names = [f"{split}-{number:06d}.tar" for number in range(shards)]
    for name, samples in zip(names, np.array_split(np.arange(count), shards), strict=True):
        with TarWriter(str(folder / name)) as writer:
            for number in samples:
                colors = np.flatnonzero(rng.random(len(CLASSES)) < 0.4)
                pixels = rng.integers(0, 200, (size, size, 3), dtype=np.uint8)
                pixels[..., colors] += 55
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                labels = json.dumps({"labels": [CLASSES[color] for color in colors]}).encode()
                writer.write({"__key__": f"{number:06d}", "png": png.getvalue(), "json": labels})
    save_index(scan(str(folder), names, CLASSES, multi_label=True), folder / f"{split}.parquet")
