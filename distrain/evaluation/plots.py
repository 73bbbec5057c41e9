"""Pictures of an evaluation: reliability diagram and confusion matrix."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distrain.evaluation.metrics import BINS, Reliability, confusion
from distrain.evaluation.table import Table
from distrain.files import write_atomically

_NAMED = 40  # classes up to which each is named
_NUMBERED = 15  # classes up to which each count is written


def plot_reliability(found: Reliability, path: Path) -> None:
    """Accuracy by confidence, and how many samples have which confidence. Raises OSError."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    edges = np.linspace(0, 1, BINS + 1)
    some = found.count > 0
    upper.bar(edges[:-1], found.accuracy, 1 / BINS, align="edge", color="#4878d0", edgecolor="white", label="accuracy")
    upper.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfectly calibrated")
    upper.plot(found.confidence[some], found.accuracy[some], "o", color="#d65f5f", label="mean confidence")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"expected calibration error {found.error:.1%}")
    upper.legend(loc="upper left")
    lower.bar(edges[:-1], found.count, 1 / BINS, align="edge", color="#4878d0", edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images")
    _save(figure, path)


def plot_confusion(table: Table, path: Path) -> None:
    """Predicted class by label, as a fraction of the label's samples. Raises OSError."""
    matrix = confusion(table)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(4.0, 0.35 * len(matrix)), 14.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="label")
    if len(matrix) <= _NAMED:
        axes.set_xticks(range(len(matrix)), table.classes, rotation=90)
        axes.set_yticks(range(len(matrix)), table.classes)
    if len(matrix) <= _NUMBERED:
        for row, column in np.argwhere(matrix):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    png = BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_atomically(path, png.getvalue(), durable=False)
