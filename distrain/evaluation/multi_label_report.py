"""What an evaluation of multi-label data writes and prints."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import Index
from distrain.evaluate import average_precision
from distrain.evaluation.multi_label import (
    SetTable,
    best_first,
    json_of,
    judge,
    reliability,
    summarize,
    write_set_table,
)
from distrain.evaluation.plots import plot_reliability
from distrain.evaluation.report import WORST, draw_images
from distrain.export.thresholds import DEFAULT, write_thresholds
from distrain.preprocessing import Preprocessing

_CLASSES = 5  # best and worst ones printed


def write_set_report(
    table: SetTable,
    thresholds: NDArray[np.float64],
    about: dict[str, Any],
    index: Index,
    preprocessing: Preprocessing,
    folder: Path,
) -> None:
    """Write the table, metrics, thresholds and pictures into a folder. Raises OSError, UserError."""
    write_set_table(table, folder / "predictions.parquet", about)
    (folder / "metrics.json").write_text(json_of(table, thresholds, about))
    write_thresholds(folder / "thresholds.json", table.classes, thresholds)
    _write_classes(table, thresholds, folder / "classes.csv")
    plot_reliability(reliability(table), folder / "reliability.png")
    wrong = np.flatnonzero((table.decide(thresholds) != table.targets).any(axis=1))
    chosen = wrong[np.argsort(-table.loss[wrong], kind="stable")][:WORST]
    if not len(chosen):
        (folder / "worst.png").unlink(missing_ok=True)  # of an earlier evaluation
        return
    captions = [
        f"{_names(table, true)}, not {_names(table, given)}"
        for true, given in zip(table.targets[chosen], table.decide(thresholds)[chosen], strict=True)
    ]
    draw_images(table.sample[chosen].tolist(), captions, index, preprocessing, folder / "worst.png")


def describe_sets(table: SetTable, thresholds: NDArray[np.float64], chosen: bool) -> Iterator[str]:
    """The metrics in words, a line each; `chosen` whether the thresholds are those of the best F1 on this table."""
    found = summarize(table, thresholds)
    yield (
        f"mAP {found['mAP']:.2%} over {found['classes_with_samples']} classes  of {found['images']:,} images  "
        f"loss {found['loss']:.4f}  calibration error {found['calibration_error']:.2%}"
    )
    what = "the thresholds of best F1 on these images" if chosen else "the given thresholds"
    for name, key in (("0.5", "at_0.5"), (what, "at_thresholds")):
        one = found[key]
        yield (
            f"at {name}: micro-F1 {one['micro_f1']:.4f}  macro-F1 {one['macro_f1']:.4f}  "
            f"precision {one['micro_precision']:.2%}  recall {one['micro_recall']:.2%}  "
            f"all labels right {one['exact_matches']:,} of {found['images']:,}"
        )
    precision = average_precision(table.targets, table.probabilities)
    order = best_first(precision)
    for name, some in (("worst", order[::-1][:_CLASSES]), ("best", order[:_CLASSES])):
        listed = ", ".join(f"{table.classes[label]} {precision[label]:.1%}" for label in some)
        yield f"{name} classes by average precision: {listed}"


def _write_classes(table: SetTable, thresholds: NDArray[np.float64], path: Path) -> None:
    half, tuned = judge(table, DEFAULT), judge(table, thresholds)
    columns = [
        average_precision(table.targets, table.probabilities),
        half.precision,
        half.recall,
        half.f1,
        thresholds,
        tuned.precision,
        tuned.recall,
        tuned.f1,
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = ("precision", "recall", "f1")
        writer.writerow(
            ["class", "samples", "average_precision", *names, "threshold", *(f"{name}_at_threshold" for name in names)]
        )
        rows = zip(table.classes, half.true.tolist(), *columns, strict=True)
        writer.writerows([name, count, *(f"{value:.6f}" for value in values)] for name, count, *values in rows)


def _names(table: SetTable, chosen: NDArray[Any]) -> str:
    return " ".join(table.classes[label] for label in np.flatnonzero(chosen)) or "none"
