"""Pixels of a batch augmented at once, as on a GPU, equal those of its images one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distrain.config import AugmentConfig
from distrain.data.augmentation import batch
from distrain.data.augmentation.batch import apply_steps, augment_batch, plan_changes
from distrain.data.augmentation.pixels import apply_change, augment_pixels
from distrain.data.augmentation.policies import _WIDE, OPERATIONS, _change, find_policy

MEAN = [0.485, 0.456, 0.406]
EVERYTHING = {"auto_augment": "ta_wide", "color_jitter": [0.4, 0.4, 0.4], "lighting": 0.1, "erase": 0.5}
POLICIES = ("ta_wide", "randaugment", "autoaugment", "autoaugment_cifar10", "augmix")


def photos(count, side):
    """Smooth images, uint8 [count, 3, side, side], in channels_last memory as loaders make them."""
    coarse = np.random.default_rng(count).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    smooth = [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse]
    return torch.from_numpy(np.array(smooth, np.uint8).reshape(count, side, side, 3)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "enabled",
    [{name: EVERYTHING[name]} for name in EVERYTHING] + [EVERYTHING | {"auto_augment": name} for name in POLICIES],
    ids=[*EVERYTHING, *POLICIES],
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


@pytest.mark.parametrize("name", [*OPERATIONS, "invert"])
@pytest.mark.parametrize("side", [1, 2, 3, 8, 33, 224, 330])
def test_every_operation_is_the_same_in_a_batch(name, side):
    """Every bin of the wide ranges and both signs, 62 images in one batch."""
    image = photos(1, side)
    changes = [_change(name, _WIDE, bin, 31, sign, side, side) for bin in range(31) for sign in (0.0, 0.9)]
    found = apply_steps(image.expand(62, -1, -1, -1), list(plan_changes([[one] for one in changes], side, side)))
    expected = [apply_change(image[0], change) for change in changes]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_costs_as_many_calls_whatever_its_size(name):
    """What is launched on a GPU must not grow with the batch, except for boxes, which few images have."""
    augment = AugmentConfig(**EVERYTHING | {"erase": 0.0, "auto_augment": name})

    def calls(count):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            augment_batch(photos(count, 16), augment, MEAN, 0, np.arange(3 * count).reshape(count, 3))
        return sum(event.count for event in profile.key_averages())

    calls(1024)  # some of it is computed once
    assert calls(2048) == pytest.approx(calls(1024), abs=8)  # an operation may be drawn for one of both only


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
    policy = find_policy(AugmentConfig(auto_augment="ta_wide"))
    plans = [policy.plan(draws, 8, 8) for draws in np.random.default_rng(0).random((64, 3)).tolist()]
    steps = list(plan_changes([plan.chains[0] for plan in plans], 8, 8))
    sent = list(batch._send(steps, gpu))
    assert [table[0].tolist() for table in sent] == [list(step.rows) for step in steps]
    assert copies == [(gpu, True)]
