"""Mixup and CutMix."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision.transforms import v2

from distrain import config
from distrain.config import AugmentConfig, LossConfig
from distrain.data.loading.loader import Batch
from distrain.errors import UserError
from distrain.recipe.losses import BinaryCrossEntropy, make_loss
from distrain.recipe.mixing import Mix, draw_mix, mix_batch

CLASSES, SIZE = 5, 16
BOTH = AugmentConfig(mixup=0.2, cutmix=1.0)


def mixed(batch: Batch, augment: AugmentConfig, seed: int, step: int, repeats: int = 1) -> Batch:
    """The batch of lane 0 mixed in a run with this augmentation."""
    return mix_batch(batch, replace(settings_of(seed, repeats), augment=augment), step, 0, 0)


@cache
def settings_of(seed: int, repeats: int) -> config.Config:
    required = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]
    words = [f"model.num_classes={CLASSES}", f"run.seed={seed}", f"data.repeats={repeats}"]
    return config.load(None, [*required, *words])


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.randint(0, CLASSES, (6,), generator=generator))


def torchvision_mixed(batch: Batch, mix: Mix) -> Batch:
    """The batch mixed by torchvision's transforms, told the same draws."""
    if mix.weight:
        transform: v2.Transform = v2.MixUp(num_classes=CLASSES)
        drawn: dict[str, Any] = {"lam": mix.weight}
    else:
        box = (mix.left, mix.top, mix.right, mix.bottom)
        transform, drawn = v2.CutMix(num_classes=CLASSES), {"box": box, "lam_adjusted": mix.share(SIZE)}
    drawn |= {"labels": batch.labels, "batch_size": len(batch.labels)}
    return Batch(transform.transform(batch.images.float(), drawn), transform.transform(batch.labels, drawn))


@pytest.mark.parametrize("step", range(12))
def test_a_batch_is_mixed_as_by_torchvision(batch, step):
    mix = draw_mix(BOTH, SIZE, 1, step, 0, 0)
    found, expected = mixed(batch, BOTH, 1, step), torchvision_mixed(batch, mix)
    torch.testing.assert_close(found.images, expected.images)
    torch.testing.assert_close(found.labels, expected.labels)
    assert torch.equal(found.labels.sum(1).round(decimals=5), torch.ones(6))


def test_lanes_too_small_to_mix_different_images_are_refused():
    words = ["run.name=a", "data.train=t", "data.val=v", "model.name=densenet121", "augment.mixup=0.2"]
    with pytest.raises(UserError, match=r"set batch.per_lane to at least 8, twice data.repeats"):
        config.load(None, [*words, "batch.per_lane=6", "data.repeats=4"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes_have_the_same_mean_for_mixed_labels(smoothing):
    logits, labels, weights = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([9.0, 20.0, 1.0, 5.0])
    loss = make_loss(LossConfig(label_smoothing=smoothing), "cross_entropy", weights)
    found = loss(logits, F.one_hot(labels, 4).float())
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weights, label_smoothing=smoothing))


def test_each_is_drawn_for_half_the_batches_and_with_its_distribution():
    drawn = [draw_mix(BOTH, 224, 0, step, 0, 0) for step in range(4000)]
    mixup, cutmix = [mix.weight for mix in drawn if mix.weight], [mix for mix in drawn if not mix.weight]
    assert len(mixup) == pytest.approx(2000, abs=150)
    assert stats.kstest(mixup, stats.beta(0.2, 0.2).cdf).pvalue > 0.01
    # Boxes that the border does not cut have sides in proportion to the square root of a uniform number.
    inner = [mix for mix in cutmix if mix.top and mix.left and mix.bottom < 224 and mix.right < 224]
    assert inner
    assert {mix.bottom - mix.top - (mix.right - mix.left) for mix in inner} == {0}
    rows = [(mix.top + mix.bottom) / 2 for mix in inner]
    assert np.mean(rows) == pytest.approx(112, abs=8)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 2.5, 4.0])
def test_weights_follow_the_beta_distribution(alpha):
    weights = [draw_mix(AugmentConfig(mixup=alpha), SIZE, 3, step, 1, 0).weight for step in range(2000)]
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_draws_depend_on_seed_step_lane_and_split_only():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [draw_mix(BOTH, 224, *key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert [draw_mix(BOTH, 224, *key) for key in keys] == drawn


def test_a_fraction_of_the_batches_is_mixed_and_all_are_of_one_type(batch):
    augment = AugmentConfig(mixup=1.0, mix_prob=0.25)
    results = [mixed(batch, augment, 0, step) for step in range(400)]
    assert {(one.images.dtype, one.labels.dtype) for one in results} == {(torch.float32, torch.float32)}
    unchanged = [torch.equal(one.images, batch.images.float()) for one in results]
    assert sum(unchanged) == pytest.approx(300, abs=30)
    assert all(
        torch.equal(one.labels.argmax(1), batch.labels) for one, same in zip(results, unchanged, strict=True) if same
    )


def test_nothing_changes_where_nothing_is_enabled_and_a_batch_is_left_as_it_was(batch):
    assert mixed(batch, AugmentConfig(), 0, 0) is batch
    before = Batch(*(tensor.clone() for tensor in batch))
    mixed(batch, BOTH, 0, 0)
    assert all(torch.equal(*pair) for pair in zip(batch, before, strict=True))


def test_several_labels_per_image_are_mixed_too(batch):
    labels = torch.tensor([[1, 0, 1, 0, 0]] * 5 + [[0, 0, 0, 0, 1]], dtype=torch.uint8)
    augment = AugmentConfig(mixup=1.0)
    found = mixed(Batch(batch.images, labels), augment, 0, 4)
    weight = draw_mix(augment, SIZE, 0, 4, 0, 0).weight
    assert found.labels[0].tolist() == pytest.approx([weight, 0, weight, 0, 1 - weight])
    loss = BinaryCrossEntropy()(torch.zeros(6, CLASSES), found.labels)
    assert float(loss) == pytest.approx(np.log(2))


def test_images_that_repeat_are_mixed_with_others(batch):
    repeated = Batch(batch.images[[0, 0, 1, 1, 2, 2]], batch.labels[[0, 0, 1, 1, 2, 2]])
    found = mixed(repeated, AugmentConfig(mixup=1.0), 0, 4, repeats=2)
    weight = draw_mix(AugmentConfig(mixup=1.0), SIZE, 0, 4, 0, 0).weight
    expected = repeated.images.float() * weight + repeated.images[[4, 5, 0, 1, 2, 3]].float() * (1 - weight)
    torch.testing.assert_close(found.images, expected)
