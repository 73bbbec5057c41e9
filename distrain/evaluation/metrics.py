"""Metrics of a table of predictions. scikit-learn does the arithmetic where it has it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.evaluation.table import Table

BINS = 15  # of the reliability diagram, as in Guo et al. 2017
_GROUPS = 4  # of images by size, and of classes by frequency


@dataclass(frozen=True)
class PerClass:
    """Precision, recall and F1 of each class, float64 [c], 0 where undefined; samples of the class, int64 [c]."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    count: NDArray[np.int64]


@dataclass(frozen=True)
class Reliability:
    """Samples by confidence, the probability of the likeliest class, in equal bins: the number of samples, their mean
    confidence and their accuracy, [BINS] each; 0 for an empty bin."""

    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The expected calibration error: the mean difference of confidence and accuracy (Guo et al. 2017, eq. 3)."""
        return float(np.sum(self.count * np.abs(self.confidence - self.accuracy)) / self.count.sum())


def summarize(table: Table) -> dict[str, Any]:
    """Counts are integers that do not depend on the number of ranks; the rest are fractions of 1."""
    top1, top5 = int(table.hits(1).sum()), int(table.hits(5).sum())
    images = len(table.sample)
    return {
        "images": images,
        "top1_hits": top1,
        "top5_hits": top5,
        "top1": top1 / images,
        "top5": top5 / images,
        "nll": float(table.loss.mean(dtype=np.float64)),
        "brier": brier(table),
        "ece": reliability(table).error,
        "macro_f1": float(per_class(table).f1[per_class(table).count > 0].mean()),
    }


def brier(table: Table) -> float:
    """The mean squared distance of the probabilities from the label's one-hot vector (Brier 1950), in [0, 2]."""
    chosen = table.probabilities.astype(np.float64)
    chosen[np.arange(len(chosen)), table.label] -= 1
    return float((chosen**2).sum(axis=1).mean())


def reliability(table: Table) -> Reliability:
    """Confidence against accuracy."""
    confidence = table.probabilities.max(axis=1).astype(np.float64)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = np.maximum(count, 1)
    return Reliability(
        count,
        np.bincount(bins, confidence, BINS) / some,
        np.bincount(bins, table.hits(1).astype(np.float64), BINS) / some,
    )


def per_class(table: Table) -> PerClass:
    """By the label of each sample."""
    from sklearn.metrics import precision_recall_fscore_support

    labels = np.arange(len(table.classes))
    precision, recall, f1, count = precision_recall_fscore_support(
        table.label, table.predicted, labels=labels, zero_division=0
    )
    return PerClass(precision, recall, f1, count.astype(np.int64))


def confusion(table: Table) -> NDArray[np.int64]:
    """Samples by label (row) and predicted class (column), int64 [c, c]."""
    from sklearn.metrics import confusion_matrix

    matrix: NDArray[np.int64] = confusion_matrix(
        table.label, table.predicted, labels=np.arange(len(table.classes))
    ).astype(np.int64)
    return matrix


def worst_pairs(table: Table, count: int) -> list[tuple[str, str, int, int]]:
    """The most frequent confusions: label, predicted class, how often, samples of the label."""
    matrix = confusion(table)
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        (table.classes[label], table.classes[other], int(wrong[label, other]), int(matrix[label].sum()))
        for label, other in pairs
        if wrong[label, other]
    ]


def by_size(table: Table) -> list[tuple[str, int, float]]:
    """Accuracy of quarters of the images by size: (geometric mean of the sides, pixels; images; top-1)."""
    side = np.sqrt(table.width.astype(np.float64) * table.height)
    return _by_quantile(side, table.hits(1), lambda low, high: f"{low:.0f} to {high:.0f} pixels")


def by_frequency(table: Table) -> list[tuple[str, int, float]]:
    """Accuracy of quarters of the images by how many samples of their class the model was trained on, or are in this
    data if it does not say: (samples; images; top-1)."""
    counts = np.bincount(table.label, minlength=len(table.classes)) if table.training is None else table.training
    return _by_quantile(
        counts[table.label].astype(np.float64), table.hits(1), lambda low, high: f"{low:.0f} to {high:.0f} samples"
    )


def _by_quantile(values: NDArray[np.float64], hits: NDArray[np.bool_], name: Any) -> list[tuple[str, int, float]]:
    edges = np.unique(np.quantile(values, np.linspace(0, 1, _GROUPS + 1)[1:], method="inverted_cdf"))
    groups = np.searchsorted(edges, values)
    found = []
    for group in np.unique(groups):
        chosen = groups == group
        found.append((name(values[chosen].min(), values[chosen].max()), int(chosen.sum()), float(hits[chosen].mean())))
    return found
