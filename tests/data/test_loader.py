import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import crop, resize

from distrain.config import DataConfig
from distrain.data import index
from distrain.data.augment import Windows, draw_windows
from distrain.data.loader import Request, normalize
from distrain.data.loaders.torch import TorchLoader
from distrain.data.plan import LaneBatch
from distrain.data.store import DataError, LocalStore

CPU = torch.device("cpu")


@pytest.fixture
def data():
    return DataConfig(train="", val="", image_size=8, val_resize=8, crop="pad", crop_pad=2, threads=2)


@pytest.fixture
def train_index(dataset):
    return index.load(f"{dataset}/train.parquet")


def open_loader(data, train_index):
    return TorchLoader(data, train_index, LocalStore(train_index), CPU)


def requests(data, train_index, start=0):
    for step in range(start, 10):
        ids = np.arange(step * 6, step * 6 + 6)
        batch = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
        yield Request(ids, draw_windows(data, 0, batch, train_index.width[ids], train_index.height[ids]))


def pixels(train_index, sample):
    encoded = LocalStore(train_index).read(sample)
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).permute(2, 0, 1)


def test_an_image_is_cut_padded_with_black_and_mirrored_as_its_window_says(data, train_index):
    box = [np.array([value], np.int32) for value in (-2, 1, 8, 8)]
    request = Request(np.array([5]), Windows(*box, np.array([True])))
    (batch,) = open_loader(data, train_index).stream([request])
    expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected[:, 2:, :7] = pixels(train_index, 5)[:, :6, 1:]
    assert torch.equal(batch.images[0], expected.flip(-1))
    assert batch.labels.tolist() == [train_index.label[5]]


def test_a_window_of_another_size_is_resized_as_torchvision_does(data, train_index):
    box = [np.array([value], np.int32) for value in (1, 2, 5, 6)]
    request = Request(np.array([9]), Windows(*box, np.array([False])))
    (batch,) = open_loader(data, train_index).stream([request])
    assert torch.equal(batch.images[0], resize(crop(pixels(train_index, 9), 1, 2, 5, 6), [8, 8], antialias=True))


def test_starting_in_the_middle_gives_the_tail_of_a_full_run(data, train_index):
    full = list(open_loader(data, train_index).stream(requests(data, train_index)))
    tail = list(open_loader(data, train_index).stream(requests(data, train_index, start=7)))
    assert len(full) == 10
    for expected, found in zip(full[7:], tail, strict=True):
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.labels, found.labels)


def test_bytes_that_are_not_those_indexed_are_an_error_that_names_the_shard(data, train_index, tmp_path):
    for shard in train_index.shards:
        (tmp_path / shard.name).write_bytes(Path(train_index.root, shard.name).read_bytes())
    damaged = tmp_path / train_index.shards[0].name
    content = bytearray(damaged.read_bytes())
    content[train_index.offset[3] + 20] ^= 255
    damaged.write_bytes(content)
    index.save(train_index, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train-000000\.tar: the \d+ bytes at \d+ are not those that were indexed"):
        list(open_loader(data, index.load(f"{tmp_path}/train.parquet")).stream(requests(data, train_index)))


def test_normalized_images_have_the_mean_and_deviation_taken_out():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    found = normalize(images, mean, std)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
