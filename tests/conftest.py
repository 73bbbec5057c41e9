import os
import sys
from io import BytesIO
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from distrain.data import index
from distrain.data.scan import scan

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")

CLASSES = ["red", "green", "blue"]


def pytest_runtest_setup(item):
    if "gpu" in item.keywords and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")


@pytest.fixture(autouse=True)
def _fresh_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Shards of small made-up images whose colour tells the class: 203 for training in 5 shards, 61 for
    validation in 2. Neither count is a multiple of anything the tests use."""
    folder = tmp_path_factory.mktemp("dataset")
    write_split(folder, "train", 203, shards=5)
    write_split(folder, "val", 61, shards=2)
    return folder


@pytest.fixture(scope="session")
def on_dataset(dataset) -> tuple[str, ...]:
    """Overrides for training on `dataset`."""
    return (
        f"data.train={dataset}/train.parquet",
        f"data.val={dataset}/val.parquet",
        "data.image_size=8",
        "data.val_resize=8",
        "data.crop=pad",
        "data.crop_pad=1",
        "model.num_classes=3",
    )


def write_split(folder: Path, split: str, count: int, shards: int, size: int = 8) -> None:
    rng = np.random.default_rng(count)
    names = [f"{split}-{number:06d}.tar" for number in range(shards)]
    for name, part in zip(names, np.array_split(np.arange(count), shards), strict=True):
        with TarWriter(str(folder / name)) as writer:
            for number in part:
                label = int(rng.integers(len(CLASSES)))
                pixels = rng.integers(0, 200, (size, size, 3), dtype=np.uint8)
                pixels[..., label] += 55
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                writer.write({"__key__": f"{number:06d}", "png": png.getvalue(), "cls": label})
    index.save(scan(str(folder), names, CLASSES), folder / f"{split}.parquet")
