"""Batches on the device, decoded ahead of the step: what is asked of every loader, and what it gives."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from distrain.data.augmentation.crops import CropBoxes
from distrain.data.sampling.plan import LaneBatch


class Request(NamedTuple):
    """n samples to decode, which part of each, and the side of the squares to make of these, pixels."""

    samples: LaneBatch
    crops: CropBoxes
    size: int
    replacement: Callable[[int], "Request"] | None = None
    """place -> a request of one, to take instead of the sample at `place` if that cannot be used. Without it a
    bad sample is left out."""
    augmented: bool = False
    """Whether the pixels are changed as in training."""
    ahead: int = 0
    """How many requests before this one's turn the store is told of it."""


class Batch(NamedTuple):
    """images: uint8 [n, 3, size, size] in channels_last memory; labels: int64 [n]. Both on the device."""

    images: torch.Tensor
    labels: torch.Tensor


class Loader(Protocol):
    """Turns requests into batches, in order, working ahead of the consumer."""

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced, or left out."""
        ...

    def close(self) -> None: ...


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 images [n, 3, h, w] as float32 with the given mean and deviation (of 0..1) taken out per channel."""
    shift = torch.tensor(mean, device=images.device).mul_(255).view(3, 1, 1)
    scale = torch.tensor(std, device=images.device).mul_(255).reciprocal_().view(3, 1, 1)
    return images.float().sub_(shift).mul_(scale)
