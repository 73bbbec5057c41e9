"""Mixup and CutMix: images of a batch blended with one another, and their labels alike."""

import math
from itertools import count
from typing import NamedTuple

import torch

from distrain.config import AugmentConfig, Config
from distrain.data.loading.loader import Batch
from distrain.rng import Stream, uniform

_FIRST_BETA = 4  # draws before those of the beta distribution


class Mix(NamedTuple):
    """How every image of a batch is mixed with another one."""

    weight: float
    """Of an image itself, within the box; outside it is 1."""
    top: int
    bottom: int
    left: int
    right: int

    def share(self, size: int) -> float:
        """The fraction that remains of an image of this side, and of its label."""
        return 1 - (1 - self.weight) * (self.bottom - self.top) * (self.right - self.left) / size**2


def mixes(augment: AugmentConfig) -> bool:
    """Whether the configuration enables anything in this module."""
    return augment.mix_prob > 0 and (augment.mixup > 0 or augment.cutmix > 0)


def mix_batch(batch: Batch, config: Config, step: int, lane: int, split: int) -> Batch:
    """Mix the images of a batch, and their labels alike, as configured.

    Returns images as float32 [n, 3, size, size] and the fraction of every class as labels, float32 [n, classes].
    """
    if not mixes(config.augment):
        return batch
    size = batch.images.shape[-1]
    mix = draw_mix(config.augment, size, config.run.seed, step, lane, split)
    labels = batch.labels
    if labels.ndim == 1:  # one_hot of torch would wait for the labels, to check them
        labels = labels[:, None] == torch.arange(config.model.num_classes, device=labels.device)
    distance = config.data.repeats  # with repeated augmentation, the image before is the same one
    return Batch(mix_images(batch.images, mix, distance), _blend(labels.float(), mix.share(size), distance))


def draw_mix(augment: AugmentConfig, size: int, *keys: int) -> Mix:
    """Draw one for images of this side: mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), each with half the
    probability if both are enabled."""
    whole = Mix(1.0, 0, size, 0, size)
    chance, which, x, y = uniform(*_stream(keys), range(_FIRST_BETA)).tolist()
    if chance >= augment.mix_prob:
        return whole
    if augment.mixup and (which < 0.5 or not augment.cutmix):
        return whole._replace(weight=_beta(augment.mixup, keys))
    half = int(0.5 * math.sqrt(1 - _beta(augment.cutmix, keys)) * size)
    column, row = int(x * size), int(y * size)
    return Mix(0.0, max(row - half, 0), min(row + half, size), max(column - half, 0), min(column + half, size))


def mix_images(images: torch.Tensor, mix: Mix, distance: int) -> torch.Tensor:
    """Mix uint8 images [n, 3, size, size]. Returns float32; leaves `images` unchanged."""
    mixed, box = images.float(), (..., slice(mix.top, mix.bottom), slice(mix.left, mix.right))
    mixed[box] = _blend(mixed[box], mix.weight, distance)
    return mixed


def _blend(values: torch.Tensor, weight: float, distance: int) -> torch.Tensor:
    return values * weight + values.roll(distance, 0) * (1 - weight)


def _beta(alpha: float, keys: tuple[int, ...]) -> float:
    """A draw of Beta(alpha, alpha), by rejection (Joehnk 1964); in logarithms, as powers of 1 / alpha are small."""
    for number in count(_FIRST_BETA, 2):
        u, v = uniform(*_stream(keys), [number, number + 1])
        if min(u, v) > 0:
            a, b = math.log(u) / alpha, math.log(v) / alpha
            if math.exp(a) + math.exp(b) <= 1:
                return math.exp(a - max(a, b)) / (math.exp(a - max(a, b)) + math.exp(b - max(a, b)))
    raise AssertionError


def _stream(keys: tuple[int, ...]) -> tuple[int, ...]:
    seed, *rest = keys
    return seed, Stream.MIX, *rest
