"""Compare two classifiers on the same images."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError
from distrain.evaluation.metrics import per_class
from distrain.evaluation.table import Table


@dataclass(frozen=True)
class Comparison:
    """What changed from one classifier to another on n common samples."""

    samples: NDArray[np.int64]
    gained: NDArray[np.bool_]
    """Samples [n] that only the second one gets right."""
    lost: NDArray[np.bool_]
    """Samples [n] that only the first one gets right."""
    p_value: float
    """Of McNemar's exact test: how likely so unequal numbers are if both were equally good (McNemar 1947)."""
    moved: list[tuple[str, float, float]]
    """(class, recall of the first, recall of the second), the most changed first."""


def compare(before: Table, after: Table) -> Comparison:
    """Compare two tables of the same data. Raises UserError if classes or labels differ or no sample is in both."""
    from scipy.stats import binomtest

    if before.classes != after.classes:
        raise UserError("--against: the two models are scored on different classes, so that they cannot be compared")
    common, first, second = np.intersect1d(before.sample, after.sample, return_indices=True)
    if not len(common) or (before.label[first] != after.label[second]).any():
        raise UserError("--against: the two tables are of different data")
    right, now_right = before.hits(1)[first], after.hits(1)[second]
    gained, lost = ~right & now_right, right & ~now_right
    changed = int(gained.sum() + lost.sum())
    p_value = float(binomtest(int(gained.sum()), changed).pvalue) if changed else 1.0
    recalls = zip(after.classes, per_class(before).recall, per_class(after).recall, strict=True)
    moved = sorted(
        ((name, float(old), float(new)) for name, old, new in recalls if old != new),
        key=lambda row: -abs(row[2] - row[1]),
    )
    return Comparison(common, gained, lost, p_value, moved)


def write_flips(found: Comparison, before: Table, after: Table, path: Path) -> None:
    """Write a CSV of the samples that only one of the two gets right. Raises OSError."""
    rows = {int(sample): row for row, sample in enumerate(before.sample)}
    later = {int(sample): row for row, sample in enumerate(after.sample)}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sample", "shard", "label", "before", "after", "change"])
        for sample, gained, lost in zip(found.samples.tolist(), found.gained, found.lost, strict=True):
            if gained or lost:
                old, new = rows[sample], later[sample]
                writer.writerow(
                    [
                        sample,
                        after.shard[new],
                        after.classes[after.label[new]],
                        before.classes[before.predicted[old]],
                        after.classes[after.predicted[new]],
                        "gained" if gained else "lost",
                    ]
                )
