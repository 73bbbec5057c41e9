"""Pixels of a batch augmented at once, as on a GPU, equal those of its images one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain.config import AugmentConfig
from distrain.data.augmentation import batch
from distrain.data.augmentation.batch import apply_steps, augment_batch, plan_trivial_augment
from distrain.data.augmentation.pixels import augment_pixels, trivial_augment_wide

MEAN = [0.485, 0.456, 0.406]
EVERYTHING = {"auto_augment": "ta_wide", "color_jitter": [0.4, 0.4, 0.4], "lighting": 0.1, "erase": 0.5}


def photos(count, side):
    """Smooth images, uint8 [count, 3, side, side], in channels_last memory as loaders make them."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    smooth = [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse]
    return torch.from_numpy(np.array(smooth, np.uint8).reshape(count, side, side, 3)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "enabled", [{name: EVERYTHING[name]} for name in EVERYTHING] + [EVERYTHING], ids=[*EVERYTHING, "everything"]
)
@given(count=st.integers(0, 9), side=st.integers(1, 64), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_a_batch_is_augmented_as_its_images_one_by_one(enabled, count, side, seed):
    images = photos(count, side)
    before = images.clone()
    samples = np.random.default_rng(seed).integers(0, 1 << 40, (count, 3))
    augment = AugmentConfig(**enabled)
    augmented = augment_batch(images, augment, MEAN, seed, samples)
    expected = [
        augment_pixels(image, augment, MEAN, seed, tuple(key))
        for image, key in zip(images, samples.tolist(), strict=True)
    ]
    assert augmented.shape == images.shape
    assert all(torch.equal(one, other) for one, other in zip(augmented, expected, strict=True))
    assert torch.equal(images, before)


@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("side", [1, 2, 3, 8, 33, 224, 330])
def test_every_operation_of_trivial_augment_is_the_same_in_a_batch(number, side):
    """Every bin of magnitude and both signs, 62 images in one batch."""
    image = photos(1, side)
    draws = np.array([[(number + 0.5) / 14, (bin + 0.5) / 31, sign] for bin in range(31) for sign in (0.0, 0.9)])
    found = apply_steps(image.expand(62, -1, -1, -1), list(plan_trivial_augment(side, side, draws)))
    assert all(torch.equal(one, trivial_augment_wide(image[0], *draw)) for one, draw in zip(found, draws, strict=True))


def test_a_batch_costs_as_many_calls_whatever_its_size():
    """What is launched on a GPU must not grow with the batch, except for boxes, which few images have."""
    augment = AugmentConfig(**EVERYTHING | {"erase": 0.0})

    def calls(count):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            augment_batch(photos(count, 16), augment, MEAN, 0, np.arange(3 * count).reshape(count, 3))
        return sum(event.count for event in profile.key_averages())

    assert calls(256) == calls(128)


def test_arguments_reach_a_fake_gpu_in_one_pinned_copy(monkeypatch):
    copies = []

    class Pinned:
        def __init__(self, values):
            self._values = values

        def to(self, device, non_blocking):
            copies.append((device, non_blocking))
            return self._values

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: Pinned(values))
    gpu = torch.device("cuda", 0)
    steps = [step for step in plan_trivial_augment(8, 8, np.random.default_rng(0).random((64, 3))) if len(step.rows)]
    sent = list(batch._send(steps, gpu))
    assert [table[0].tolist() for table in sent] == [list(step.rows) for step in steps]
    assert copies == [(gpu, True)]
