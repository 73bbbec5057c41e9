"""Shards of small synthetic images."""

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
