"""Shards of generated JPEG files, built as a user builds them."""

from pathlib import Path

import numpy as np
from PIL import Image

from distrain import cli
from distrain.bench.gpu.setup import Scale

CLASSES = 4


def build_shards(folder: Path, scale: Scale) -> list[str]:
    """Write JPEG files and build a training and a validation split of them with `distrain shards build`. Returns the
    settings of a run on them."""
    source, out = folder / "images", folder / "shards"
    rng = np.random.default_rng(0)
    for number in range(scale.images):
        path = source / f"class{number % CLASSES}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(rng, scale.image_width).save(path, quality=90)
    cli.run(["shards", "build", str(source), "--out", str(out), "--val-fraction", "0.25"])
    size = [f"data.image_size={scale.image_size}", f"data.val_resize={scale.image_size}"]
    index = [f"data.train={out}/train.parquet", f"data.val={out}/val.parquet"]
    return [*index, *size, "data.loader=torch", f"model.num_classes={CLASSES}", "run.name=run", "track.uri=none"]


def draw(rng: np.random.Generator, width: int) -> Image.Image:
    """An image with details of several sizes, as photographs have, which makes its JPEG as large as theirs."""
    height = width * 3 // 4
    layers = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (4, 16, 64)]
    image = layers[0].resize((width, height))
    for layer, weight in zip(layers[1:], (0.4, 0.25), strict=True):
        image = Image.blend(image, layer.resize((width, height)), weight)
    return image
