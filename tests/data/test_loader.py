import io
import json
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import crop, resize

from distrain.config import AugmentConfig, DataConfig
from distrain.data.augmentation.crops import CropBoxes, draw_crop_boxes
from distrain.data.loading.dali import DaliLoader, find_rejection
from distrain.data.loading.loader import Request, normalize
from distrain.data.loading.loaders import open_loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.plan import LaneBatch
from distrain.data.storage.store import LocalStore

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(crop="pad", crop_pad=2)


@pytest.fixture
def data():
    return DataConfig(train="", val="", image_size=8, val_resize=8, threads=2, max_bad=0.5)


@pytest.fixture(params=["torch", "dali"])
def load(request, tmp_path):
    """load(data, index, requests[, augment]) -> batches. Lists bad samples in tmp_path/quarantine.jsonl."""

    def load_all(data, train_index, requests, augment=AUGMENT):
        quarantine = Quarantine(tmp_path / "quarantine.jsonl", "train", len(train_index), data.max_bad)
        reader = SampleReader(train_index, LocalStore(train_index), quarantine)
        with closing(open_loader(request.param, data, augment, 0, 6, reader, CPU)) as loader:
            return list(loader.stream(requests))

    return load_all


def close(images, expected):
    """Whether pixels are equal up to rounding: the two loaders resize and pad differently."""
    return (images.int() - expected.int()).abs().float().mean() <= 1


def samples(*ids):
    return LaneBatch(np.array(ids), np.zeros(len(ids), int), np.zeros(len(ids), int))


def requests(data, train_index, start=0, augmented=False, augment=AUGMENT):
    for step in range(start, 10):
        batch = samples(*range(step * 6, step * 6 + 6))
        widths, heights = train_index.width[batch.ids], train_index.height[batch.ids]
        crops = draw_crop_boxes(augment, data, 0, batch, widths, heights)
        yield Request(batch, crops, data.image_size, augmented=augmented)


def pixels(train_index, sample):
    encoded = LocalStore(train_index).read(sample)
    return torch.from_numpy(np.array(Image.open(io.BytesIO(encoded)))).permute(2, 0, 1)


def test_an_image_is_cropped_padded_with_black_and_flipped(data, train_index, load):
    box = [np.array([value], np.int32) for value in (-2, 1, 8, 8)]
    (batch,) = load(data, train_index, [Request(samples(5), CropBoxes(*box, np.array([True])), 8)])
    expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected[:, 2:, :7] = pixels(train_index, 5)[:, :6, 1:]
    assert torch.equal(batch.images[0], expected.flip(-1))
    assert batch.labels.tolist() == [train_index.label[5]]


def test_a_crop_of_another_size_is_resized_as_by_torchvision(data, train_index, load):
    box = [np.array([value], np.int32) for value in (1, 2, 5, 6)]
    (batch,) = load(data, train_index, [Request(samples(9), CropBoxes(*box, np.array([False])), 8)])
    assert close(batch.images[0], resize(crop(pixels(train_index, 9), 1, 2, 5, 6), [8, 8], antialias=True))


@pytest.mark.parametrize(("top", "left"), [(8, 0), (30, 2), (-8, 0), (0, 8), (3, -11), (-20, 20)])
def test_a_crop_box_outside_the_image_is_black(data, train_index, load, top, left):
    box = [np.array(values, np.int32) for values in ((top, 0), (left, 0), (8, 8), (8, 8))]
    (batch,) = load(data, train_index, [Request(samples(5, 5), CropBoxes(*box, np.zeros(2, bool)), 8)])
    assert not batch.images[0].any()
    assert torch.equal(batch.images[1], pixels(train_index, 5))


def test_padding_may_exceed_the_image_size(data, train_index, load):
    batches = load(data, train_index, requests(data, train_index, augment=replace(AUGMENT, crop_pad=20)))
    black = [not image.any() for batch in batches for image in batch.images]
    assert len(black) == 60
    assert 0 < sum(black) < 60


def test_starting_in_the_middle_yields_the_tail_of_a_full_run(data, train_index, load):
    augment = replace(AUGMENT, auto_augment="ta_wide", color_jitter=[0.4, 0.4, 0.4], lighting=0.1, erase=0.5)
    full = load(data, train_index, requests(data, train_index, augmented=True), augment)
    tail = load(data, train_index, requests(data, train_index, start=7, augmented=True), augment)
    assert len(full) == 10
    for expected, found in zip(full[7:], tail, strict=True):
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.labels, found.labels)


def test_only_training_augments_pixels(data, train_index, load):
    lighting = replace(AUGMENT, lighting=0.5)
    plain = load(data, train_index, requests(data, train_index))
    assert torch.equal(load(data, train_index, requests(data, train_index), lighting)[0].images, plain[0].images)
    trained = load(data, train_index, requests(data, train_index, augmented=True), lighting)
    assert not torch.equal(trained[0].images, plain[0].images)


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane_and_listed(data, train_index, load, tmp_path):
    bad = damage(train_index, 3, tmp_path)

    def request(stream):
        batch = samples(*stream)
        widths, heights = train_index.width[batch.ids], train_index.height[batch.ids]
        crops = draw_crop_boxes(replace(AUGMENT, crop="none", flip=0.0), data, 0, batch, widths, heights)
        return Request(batch, crops, 8, replacement=lambda i: request(batch.ids[i : i + 1] + 1))

    (batch,) = load(data, bad, [request(range(6))])
    assert batch.labels.tolist() == train_index.label[[0, 1, 2, 4, 4, 5]].tolist()
    assert torch.equal(batch.images[3], pixels(train_index, 4))
    (entry,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert (entry["split"], entry["sample"]) == ("train", 3)
    assert entry["reason"].startswith("train-000000.tar at ")


def test_without_a_replacement_a_bad_sample_is_dropped(data, train_index, load, tmp_path):
    bad = damage(train_index, 3, tmp_path)
    first = next(requests(data, bad))
    (batch,) = load(data, bad, [first])
    assert batch.labels.tolist() == train_index.label[[0, 1, 2, 4, 5]].tolist()
    assert len(batch.images) == 5


REJECTED = """Critical error in pipeline:
Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`,
which was used in the pipeline definition with the following traceback:

  File "dali.py", line 1, in graph

encountered:

{}
Current pipeline object is no longer valid.
"""


@pytest.mark.parametrize(
    ("message", "rejection"),
    [
        (REJECTED.format("Failed to decode sample #1 : "), "Failed to decode sample #1"),
        (REJECTED.format("nvImageCodec failure: '#4'"), "nvImageCodec failure: '#4'"),
        (REJECTED.format("nvImageCodec failure: '#5'"), None),
        (REJECTED.format("Can't allocate 123456789 bytes on device 0."), None),
        (REJECTED.replace("decoders.image_slice", "resize").format("std::bad_alloc"), None),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", None),
    ],
)
def test_only_a_failure_to_decode_counts_as_a_rejected_image(message, rejection):
    assert find_rejection(message) == rejection


def open_dali(data, train_index, folder, device=CPU):
    quarantine = Quarantine(folder / "quarantine.jsonl", "train", len(train_index), data.max_bad)
    return closing(
        open_loader("dali", data, AUGMENT, 0, 6, SampleReader(train_index, LocalStore(train_index), quarantine), device)
    )


def test_images_that_dali_rejects_are_reported_once(data, train_index, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(DaliLoader, "_run", fail_with(REJECTED.format("Failed to decode sample #1 : ")))
    all_requests = list(requests(data, train_index))
    with open_dali(data, train_index, tmp_path) as loader:
        batches = list(loader.stream(all_requests))
    assert [batch.labels.tolist() for batch in batches] == [
        train_index.label[request.samples.ids].tolist() for request in all_requests
    ]
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("DALI rejected an image (Failed to decode sample #1): decoding this batch")


def test_an_error_not_about_an_image_is_raised(data, train_index, tmp_path, monkeypatch):
    monkeypatch.setattr(DaliLoader, "_run", fail_with("CUDA out of memory"))
    with open_dali(data, train_index, tmp_path) as loader, pytest.raises(RuntimeError, match="CUDA out of memory"):
        list(loader.stream(requests(data, train_index)))


def fail_with(message):
    def fail(*args):
        raise RuntimeError(message)

    return fail


@pytest.mark.gpu
def test_a_batch_on_a_gpu_is_not_overwritten_while_the_device_lags_behind(data, train_index, tmp_path):
    """Batches are copied, and their memory reused, in the right order however late the network reads them."""
    device = torch.device("cuda", 0)
    data = replace(data, prefetch=2)
    received = []
    with open_dali(data, train_index, tmp_path, device) as loader:
        for _ in range(20):
            for batch in loader.stream(requests(data, train_index)):
                torch.cuda._sleep(10_000_000)
                received.append(batch.images + 0)
    with open_dali(data, train_index, tmp_path) as loader:
        expected = list(loader.stream(requests(data, train_index)))
    assert all(torch.equal(received[n].cpu(), received[n % 10].cpu()) for n in range(200))
    assert all(close(received[n].cpu(), batch.images) for n, batch in enumerate(expected))


def damage(original, sample, folder):
    """Copy the data to `folder` with one image truncated. Returns the index of it, with matching size and checksum."""
    for shard in original.shards:
        (folder / shard.name).write_bytes(Path(original.root, shard.name).read_bytes())
    size, crc32 = original.size.copy(), original.crc32.copy()
    size[sample] //= 2
    encoded = LocalStore(original).read(sample)[: size[sample]]
    crc32[sample] = zlib.crc32(encoded)
    return replace(original, root=str(folder), size=size, crc32=crc32)


def test_images_are_normalized_by_mean_and_std():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    normalized = normalize(images, mean, std)
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-5)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
