"""The loss of classification, and weights of its classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from distrain.class_numbers import read_class_numbers
from distrain.config import LossConfig
from distrain.data.index import Index
from distrain.errors import UserError

BALANCED = "balanced"


class CrossEntropy(nn.Module):
    """Cross-entropy: the mean over samples, weighted by their classes' `weights`, float [classes].

    Targets are labels, int64 [n], or the fraction of every class, float32 [n, classes], whose weights torch would not
    divide by.
    """

    def __init__(self, weights: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self._weights = weights
        self._label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss, float [], of logits [n, classes]."""
        weights, smoothing = self._weights, self._label_smoothing
        if weights is None or targets.ndim == 1:
            return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
        total = F.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=smoothing)
        return total / (targets @ weights).sum()


class BinaryCrossEntropy(nn.Module):
    """Every class decided by itself: the mean over samples and classes, computed in fp32.

    Targets are labels, int64 [n], whose one-hot vectors are smoothed as by cross-entropy (Wightman et al. 2021 train
    like this), or uint8 [n, classes]. `pos_weight`, float [classes], multiplies the loss of targets of 1.
    """

    def __init__(self, pos_weight: torch.Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self._pos_weight = pos_weight
        self._label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss, float [], of logits [n, classes]."""
        classes = logits.shape[1]
        wanted = (F.one_hot(targets, classes) if targets.ndim == 1 else targets).float()
        if self._label_smoothing:
            wanted = wanted * (1 - self._label_smoothing) + self._label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=self._pos_weight)


def loss_name(config: LossConfig, index: Index) -> str:
    """The loss that `auto` stands for, or the one configured."""
    return config.name if config.name != "auto" else "bce" if index.multi_label else "cross_entropy"


def make_loss(config: LossConfig, name: str, weights: torch.Tensor | None) -> nn.Module:
    """The loss `name` of logits [n, classes] and targets; `weights` of the classes, float [classes]."""
    if name == "bce":
        return BinaryCrossEntropy(weights, config.label_smoothing)
    return CrossEntropy(weights, config.label_smoothing)


def loss_weights(config: LossConfig, index: Index) -> NDArray[np.float32] | None:
    """The weight of each class in the loss, float32 [classes]; None for equal ones. Raises UserError as
    `class_weights`."""
    counts = index.class_counts()
    if loss_name(config, index) == "bce":
        return class_weights(config.class_weights, index.classes, counts, len(index))
    return class_weights(config.class_weights, index.classes, counts)


def class_weights(
    setting: str, classes: Sequence[str], counts: NDArray[np.int64], images: int | None = None
) -> NDArray[np.float32] | None:
    """The weight of each class in the loss, float32 [classes], from `loss.class_weights`; None for equal weights.

    `balanced` weighs a class by samples / (classes x its samples), so that all have the same sum of weights; or, where
    each class is decided by itself in a number of `images`, by images without it / images with it. Anything else is a
    JSON file with the weight of every class by name. `counts` are the samples of each class, int64 [classes].
    Raises UserError for a class without samples, or a file that does not name every class.
    """
    if not setting:
        return None
    if setting == BALANCED:
        if not counts.all():
            empty = classes[int(np.argmin(counts))]
            raise UserError(
                f"loss.class_weights=balanced: data.train has no sample of {empty}: remove it from the index"
            )
        if images is not None:
            return ((images - counts) / counts).astype(np.float32)
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)
    return read_class_numbers(Path(setting), classes, option="loss.class_weights:", noun="weight").astype(np.float32)
