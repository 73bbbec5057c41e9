"""The learning curves of a run as an image."""

from collections.abc import Sequence
from pathlib import Path

from distrain.track.spool import Entry


def plot_curves(entries: Sequence[Entry], path: Path) -> Path:
    """Plot loss and accuracy, or mAP, over steps, training and validation, to an image file. Returns `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    quality = (
        ("mAP", "mAP, %") if any("val/mAP" in entry.metrics for entry in entries) else ("top1", "top-1 accuracy, %")
    )
    for ax, metric, label, scale in ((axes[0], "loss", "loss", 1), (axes[1], *quality, 100)):
        for split, style in (("train", {"alpha": 0.6, "linewidth": 1}), ("val", {"marker": "o"})):
            points = {  # of entries for the same step the last one counts
                entry.step: scale * entry.metrics[f"{split}/{metric}"]
                for entry in entries
                if f"{split}/{metric}" in entry.metrics
            }
            if points:
                ax.plot(*zip(*sorted(points.items()), strict=True), label=split, **style)
        ax.set_xlabel("step")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        if ax.has_data():
            ax.legend()
    figure.savefig(path, dpi=120)
    return path
