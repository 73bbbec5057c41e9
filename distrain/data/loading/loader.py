"""The interface of every loader: requests in, batches on the device out, decoded ahead of the step."""

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch

from distrain.data.augmentation.crops import CropBoxes
from distrain.data.sampling.plan import LaneBatch


class Request(NamedTuple):
    """n samples to decode, their crop boxes, and the side of the square images to return, pixels."""

    samples: LaneBatch
    crops: CropBoxes
    size: int
    replacement: Callable[[int], "Request"] | None = None
    """index -> a request for one sample, to use instead of the bad sample at `index`. Without it the batch is smaller
    by the bad samples."""
    augmented: bool = False
    """Whether pixels are augmented, as in training."""
    ahead: int = 0
    """How many requests before its turn the store starts to prefetch its samples."""


class Batch(NamedTuple):
    """images: uint8 [n, 3, size, size] in channels_last memory; labels: int64 [n], or uint8 [n, classes] as in
    `Index.targets`. Both on the device. Mixed ones are float32: see recipe/mixing.py."""

    images: torch.Tensor
    labels: torch.Tensor


class Loader(Protocol):
    """Turns requests into batches, in order, working ahead of the consumer."""

    def stream(self, requests: Iterable[Request]) -> Generator[Batch, None, None]:
        """Yield one batch per request. Bad samples are quarantined and replaced or dropped."""
        ...

    def close(self) -> None: ...


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalize images in [0, 255], [n, 3, h, w], per channel to float32, by `mean` and `std` of values in [0, 1]."""
    shift, scale = _shift_and_scale(tuple(mean), tuple(std), images.device)
    return images.float().sub(shift).mul_(scale)


@cache
def _shift_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `normalize` subtracts and multiplies by, [3, 1, 1] each. Made once, as the device is waited for."""
    shift = torch.tensor(mean, device=device).mul_(255).view(3, 1, 1)
    scale = torch.tensor(std, device=device).mul_(255).reciprocal_().view(3, 1, 1)
    return shift, scale
