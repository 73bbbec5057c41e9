"""Exact validation: every sample once, on any number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.loader import Batch, Loader, normalize
from distrain.data.loading.requests import validation_requests
from distrain.parallel.group import Group


class Quality(Protocol):
    """What a validation measures; equal on every rank."""

    @property
    def score(self) -> float:
        """What the best checkpoint has most of, in [0, 1]."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return everything by metric name."""
        ...

    def __str__(self) -> str:
        """The same in words."""
        ...


@dataclass(frozen=True)
class Accuracy:
    """Counts over the whole validation set, and the mean cross-entropy `loss`."""

    images: int
    top1: int
    top5: int
    loss: float
    classes: int

    @property
    def score(self) -> float:
        return self.top1 / self.images

    def metrics(self) -> dict[str, float]:
        found = {"val/loss": self.loss, "val/top1": self.score}
        # Among five classes or fewer it is always 1.
        return found | ({"val/top5": self.top5 / self.images} if self.classes > 5 else {})

    def __str__(self) -> str:
        top5 = f"  top-5 {self.top5 / self.images:.2%}" if self.classes > 5 else ""
        return f"top-1 {self.score:.2%}{top5}  of {self.images:,} images"


@dataclass(frozen=True)
class Precision:
    """Of multi-label data: the mean over classes of their average precision, and the mean binary cross-entropy."""

    images: int
    mean_average_precision: float
    loss: float

    @property
    def score(self) -> float:
        return self.mean_average_precision

    def metrics(self) -> dict[str, float]:
        return {"val/loss": self.loss, "val/mAP": self.score}

    def __str__(self) -> str:
        return f"mAP {self.score:.2%}  of {self.images:,} images"


@torch.no_grad()
def evaluate(
    network: nn.Module,
    index: Index,
    loader: Loader,
    config: Config,
    group: Group,
    before_batch: Callable[[], object],
) -> Quality:
    """Validate `network` on all samples of `index`. Every rank calls `before_batch` equally often.

    The batches do not depend on the number of ranks, which take turns, so every image goes through the same arithmetic
    and the counts are exactly equal on any number of ranks.
    """
    results = _Scores(group) if index.multi_label else _Counts(group, len(index.classes))
    total_batches = -(-len(index) // config.evaluate.batch)
    batches = loader.stream(validation_requests(config, index, range(group.rank, total_batches, group.world)))
    empty = empty_batch(config.data.image_size, index, group.device)
    network.eval()
    try:
        for number in range(group.rank, group.rank + total_batches, group.world):
            before_batch()
            # There may be fewer batches in the last round than ranks, but a partitioned network needs all of them.
            batch = next(batches, empty)
            images = normalize(batch.images, config.data.mean, config.data.std)
            logits = network(images).float()
            if config.evaluate.flip:
                logits = (logits + network(images.flip(-1)).float()) / 2
            results.add(number, logits, batch.labels)
    finally:
        network.train()
        batches.close()
    return results.combine()


class _Counts:
    """Hits of the batches of this rank."""

    def __init__(self, group: Group, classes: int) -> None:
        self._group = group
        self._classes = classes
        self._counts = torch.zeros(3, dtype=torch.int64, device=group.device)
        self._loss = torch.zeros(1, dtype=torch.float64, device=group.device)

    def add(self, number: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        rank = rank_of_label(logits, labels)
        self._counts += torch.stack([torch.ones_like(rank), rank < 1, rank < 5]).sum(dim=1)
        self._loss += F.cross_entropy(logits, labels, reduction="sum")

    def combine(self) -> Accuracy:
        images, top1, top5 = self._group.sum(self._counts).tolist()
        return Accuracy(images, top1, top5, self._group.sum(self._loss).item() / images, self._classes)


class _Scores:
    """Probabilities of the batches of this rank. The main rank gets all of them, as precision depends on their order
    among all images."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._batches: list[tuple[int, float, NDArray[np.float32], NDArray[np.uint8]]] = []

    def add(self, number: int, logits: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum").item()
        self._batches.append((number, loss, probabilities_of(logits).cpu().numpy(), labels.cpu().numpy()))

    def combine(self) -> Precision:
        gathered = self._group.gather_on_main(self._batches)
        return self._group.on_main(partial(self._measure, gathered))

    @staticmethod
    def _measure(gathered: list[Any]) -> Precision:
        batches = sorted((batch for batches in gathered for batch in batches), key=lambda batch: batch[0])
        _, losses, scores, targets = zip(*batches, strict=True)
        images, classes = np.concatenate(targets).shape
        found = average_precision(np.concatenate(targets), np.concatenate(scores))
        return Precision(images, mean_of_defined(found), sum(losses) / max(images * classes, 1))


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities of logits, each of a class decided by itself. float32, rounded once."""
    return logits.double().sigmoid().float()


def average_precision(targets: NDArray[np.uint8], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """The average precision of each class, float64 [classes], from targets and scores [n, classes]: NaN for a class
    without positives, 0 where a score is NaN, so that a network that has diverged is never right."""
    from sklearn.metrics import average_precision_score

    found = np.full(targets.shape[1], np.nan)
    for label in np.flatnonzero(targets.any(axis=0)):
        column = scores[:, label]
        found[label] = 0.0 if np.isnan(column).any() else average_precision_score(targets[:, label], column)
    return found


def mean_of_defined(values: NDArray[np.float64]) -> float:
    """The mean of the values that are not NaN, 0 if there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else 0.0


def top1_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the likeliest class of each image is its label, or one of them, [n]; `labels` as in `Batch`."""
    best = logits.argmax(dim=1)
    return best == labels if labels.ndim == 1 else labels.gather(1, best[:, None])[:, 0]


def empty_batch(size: int, index: Index, device: torch.device) -> Batch:
    """Return a batch without images."""
    images = torch.empty(0, 3, size, size, dtype=torch.uint8, device=device)
    return Batch(images, torch.from_numpy(index.targets([])).to(device))


def rank_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return how many other classes do not score lower than the true one: 0 is a top-1 hit. int64 [n].

    Ties and NaN count as misses, so a network that outputs the same for all classes, or has diverged, is never right.
    """
    true_logit = logits.gather(1, labels[:, None])
    return (~(logits < true_logit)).sum(dim=1) - 1
