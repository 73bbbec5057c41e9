"""A classifier from images to logits: the preprocessing and the network in one module."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from distrain.data.image import decode_rgb
from distrain.export.model import Model
from distrain.preprocessing import Preprocessing

_BICUBIC = -0.5  # parameter a of the kernel (Keys 1981), as in antialiased resizing of Pillow and torch


class Preprocess(nn.Module):
    """uint8 images [n, 3, h, w] of any size -> the network's input, float32 [n, 3, crop, crop].

    What resizing the short side and a center crop would keep is resized with antialiasing, then normalized. It is
    written as two matrix products, so that exported programs take images of any size.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, settings: Preprocessing) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", 255 * torch.tensor(settings.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(settings.std).view(3, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.float()
        rows, columns = (_pixel_centers(pixels, dim) for dim in (2, 3))
        height, width = rows[-1] + 0.5, columns[-1] + 0.5
        side = (torch.minimum(height, width) * (self.settings.crop / self.settings.resize)).round().clamp(min=1)
        vertical = self._weights(rows, ((height - side) / 2).floor(), side)
        horizontal = self._weights(columns, ((width - side) / 2).floor(), side)
        pixels = (vertical @ pixels @ horizontal.mT).clamp(0, 255)
        return (pixels - self.mean) / self.std

    def _weights(self, centers: torch.Tensor, start: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        """The share of each of the n pixels with these centers in each of the outputs, float32 [crop, n]."""
        scale = side / self.settings.crop
        outputs = torch.arange(self.settings.crop, device=centers.device) + 0.5
        distance = (centers - start - outputs[:, None] * scale).abs() / scale.clamp(min=1)
        kernel = _triangle(distance) if self.settings.interpolation == "bilinear" else _cubic(distance)
        weights = kernel * ((centers > start) & (centers < start + side))
        return weights / weights.sum(dim=1, keepdim=True)


class Classifier(nn.Module, Model):
    """A network with its preprocessing."""

    def __init__(
        self, network: nn.Module, preprocessing: Preprocessing, classes: Sequence[str], record: dict[str, Any]
    ) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocessing)
        self.network = network
        self.preprocessing = preprocessing
        self.classes = tuple(classes)
        self.record = record
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self.preprocess(images))
        return logits

    def to_record(self) -> dict[str, Any]:
        """What a file of its weights says of it, as JSON holds it."""
        return {**self.record, "classes": list(self.classes), "preprocessing": self.preprocessing.to_record()}

    def train(self, mode: bool = True) -> "Classifier":
        """A classifier predicts: it stays in evaluation mode. Train its `network` instead."""
        super().train(False)
        return self


def read_image(data: bytes) -> torch.Tensor:
    """Decode an encoded image to uint8 [1, 3, h, w] as stored, as training does: EXIF orientation is ignored.

    Raises ImageError.
    """
    return torch.from_numpy(np.ascontiguousarray(decode_rgb(data).transpose(2, 0, 1)))[None]


def _pixel_centers(images: torch.Tensor, dim: Literal[2, 3]) -> torch.Tensor:
    """0.5, 1.5, ... along a dimension, float32. From the tensor, as exported programs learn sizes from tensors only."""
    line = images[0, 0, :, 0] if dim == 2 else images[0, 0, 0, :]
    return torch.ones_like(line).cumsum(0) - 0.5


def _triangle(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: torch.Tensor) -> torch.Tensor:
    a, d = _BICUBIC, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
