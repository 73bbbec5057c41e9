"""Predictions of any number of labels per image: the table, and metrics of it. Equal to scikit-learn's."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.evaluate import average_precision, mean_of_defined
from distrain.evaluation.metrics import BINS, Reliability
from distrain.evaluation.table import write_columns
from distrain.export.thresholds import DEFAULT


@dataclass(frozen=True)
class SetTable:
    """n predictions over c scored classes."""

    classes: tuple[str, ...]
    """Names of the scored classes."""
    sample: NDArray[np.int64]
    shard: NDArray[Any]
    """Name of the shard that holds the sample [n]."""
    targets: NDArray[np.uint8]
    """1 for each label of the sample and 0 for each other class [n, c]."""
    probabilities: NDArray[np.float32]
    """[n, c], each of a class decided by itself."""
    loss: NDArray[np.float32]
    """Binary cross-entropy, mean over the classes [n]."""
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    """Of the stored image, pixels [n]."""

    def decide(self, thresholds: NDArray[np.float64] | float) -> NDArray[np.bool_]:
        """Whether each sample is given each label: its probability is at least the threshold, [c] or one for all."""
        return self.probabilities.astype(np.float64) >= thresholds


@dataclass(frozen=True)
class Decisions:
    """Right and wrong decisions about each class, int64 [c] each."""

    right: NDArray[np.int64]
    """Labels that are given and true."""
    given: NDArray[np.int64]
    true: NDArray[np.int64]
    exact: int
    """Samples whose labels are all given, and no others."""

    @property
    def precision(self) -> NDArray[np.float64]:
        """Of each class, 0 where undefined."""
        return self.right / np.maximum(self.given, 1)

    @property
    def recall(self) -> NDArray[np.float64]:
        """Of each class, 0 where undefined."""
        return self.right / np.maximum(self.true, 1)

    @property
    def f1(self) -> NDArray[np.float64]:
        """Of each class, 0 where undefined."""
        return 2 * self.right / np.maximum(self.given + self.true, 1)

    def summarize(self) -> dict[str, float]:
        """Micro averages over all decisions, macro averages over the classes with samples."""
        right, given, true = (int(counts.sum()) for counts in (self.right, self.given, self.true))
        present = self.true > 0
        return {
            "exact_matches": self.exact,
            "micro_precision": right / max(given, 1),
            "micro_recall": right / max(true, 1),
            "micro_f1": 2 * right / max(given + true, 1),
            **{f"macro_{name}": float(getattr(self, name)[present].mean()) for name in ("precision", "recall", "f1")},
        }


def judge(table: SetTable, thresholds: NDArray[np.float64] | float) -> Decisions:
    """Compare the labels given at thresholds with the true ones."""
    given, true = table.decide(thresholds), table.targets.astype(np.bool_)
    exact = int((given == true).all(axis=1).sum())
    return Decisions((given & true).sum(axis=0), given.sum(axis=0), true.sum(axis=0), exact)


def best_thresholds(table: SetTable) -> NDArray[np.float64]:
    """The threshold of each class with the best F1 on this table, [c]; 0.5 for a class without samples."""
    from sklearn.metrics import precision_recall_curve

    chosen = np.full(len(table.classes), DEFAULT)
    for label in np.flatnonzero(table.targets.any(axis=0)):
        precision, recall, thresholds = precision_recall_curve(table.targets[:, label], table.probabilities[:, label])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        chosen[label] = thresholds[int(f1[:-1].argmax())]
    return chosen


def summarize(table: SetTable, thresholds: NDArray[np.float64]) -> dict[str, Any]:
    """Everything in numbers; counts are integers that do not depend on the number of ranks."""
    found = average_precision(table.targets, table.probabilities)
    return {
        "images": len(table.sample),
        "labels": int(table.targets.sum()),
        "mAP": mean_of_defined(found),
        "classes_with_samples": int((~np.isnan(found)).sum()),
        "loss": float(table.loss.mean(dtype=np.float64)),
        "calibration_error": reliability(table).error,
        "at_0.5": judge(table, DEFAULT).summarize(),
        "at_thresholds": judge(table, thresholds).summarize(),
    }


def reliability(table: SetTable) -> Reliability:
    """Probability against frequency, over all samples and classes."""
    probability = table.probabilities.astype(np.float64).ravel()
    bins = np.clip(np.ceil(probability * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = np.maximum(count, 1)
    hits = table.targets.ravel().astype(np.float64)
    return Reliability(count, np.bincount(bins, probability, BINS) / some, np.bincount(bins, hits, BINS) / some)


def write_set_table(table: SetTable, path: Path, about: dict[str, Any]) -> None:
    """Write predictions.parquet; `about` says of which model and data. Raises OSError."""
    import pyarrow

    columns = {
        "sample": table.sample,
        "shard": pyarrow.array(table.shard).dictionary_encode(),
        "labels": pyarrow.array([np.flatnonzero(row) for row in table.targets], pyarrow.list_(pyarrow.int32())),
        "probabilities": list(table.probabilities),
        "loss": table.loss,
        "width": table.width,
        "height": table.height,
    }
    write_columns(columns, path, {"classes": table.classes, **about})


def best_first(values: NDArray[np.float64]) -> list[int]:
    """The positions of the values that are not NaN, the largest first."""
    defined = np.flatnonzero(~np.isnan(values))
    order: list[int] = defined[np.argsort(-values[defined], kind="stable")].tolist()
    return order


def json_of(table: SetTable, thresholds: NDArray[np.float64], about: dict[str, Any]) -> str:
    """The content of metrics.json."""
    return json.dumps({**about, **summarize(table, thresholds)}, indent=1) + "\n"
