"""What every classifier has, of PyTorch or exported."""

from typing import Any, Protocol

import torch

from distrain.preprocessing import Preprocessing


class Model(Protocol):
    """uint8 images [n, 3, h, w] (RGB) of any size -> logits, float32 [n, classes]."""

    classes: tuple[str, ...]
    """Names of the logits."""
    preprocessing: Preprocessing
    record: dict[str, Any]
    """Where the weights come from, of which network they are and, if known, the training samples of each class."""

    @property
    def multi_label(self) -> bool:
        """Whether each class is decided by itself, by the sigmoid of its logit."""
        return bool(self.record.get("multi_label"))

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The probability from which on an image has each label, [classes]; empty unless chosen when exported."""
        return tuple(self.record.get("thresholds", ()))

    def __call__(self, images: torch.Tensor) -> torch.Tensor: ...
