"""What an evaluation writes and prints."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from distrain.config import DownloadConfig
from distrain.data.index import Index
from distrain.data.loading.jpeg_region import decode_region, resize
from distrain.data.storage.remote import open_store
from distrain.data.storage.store import DataError
from distrain.evaluation.comparison import Comparison
from distrain.evaluation.metrics import by_frequency, by_size, per_class, reliability, summarize, worst_pairs
from distrain.evaluation.plots import plot_confusion, plot_reliability
from distrain.evaluation.predictions import TOP
from distrain.evaluation.table import Table, write_table
from distrain.preprocessing import Preprocessing
from distrain.sheet import write_sheet

WORST = 24  # images in the contact sheet
_PAIRS = 10
_CLASSES = 5  # best and worst ones printed


def write_report(table: Table, about: dict[str, Any], index: Index, preprocessing: Preprocessing, folder: Path) -> None:
    """Write the table, metrics, pictures and the worst-classified images into a folder. Raises OSError, UserError."""
    write_table(table, folder / "predictions.parquet", about)
    (folder / "metrics.json").write_text(json.dumps({**about, **summarize(table)}, indent=1) + "\n")
    found = per_class(table)
    with (folder / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "samples", "precision", "recall", "f1"])
        rows = zip(table.classes, found.count, found.precision, found.recall, found.f1, strict=True)
        writer.writerows([name, count, f"{p:.6f}", f"{r:.6f}", f"{f:.6f}"] for name, count, p, r, f in rows)
    plot_reliability(reliability(table), folder / "reliability.png")
    plot_confusion(table, folder / "confusion.png")
    write_worst(table, index, preprocessing, folder / "worst.png")


def write_worst(table: Table, index: Index, preprocessing: Preprocessing, path: Path) -> None:
    """Draw the wrongly classified images of the largest loss, with label and predicted class."""
    wrong = np.flatnonzero(~table.hits(1))
    chosen = wrong[np.argsort(-table.loss[wrong], kind="stable")][:WORST]
    captions = [f"{table.classes[table.label[row]]}, not {table.classes[table.predicted[row]]}" for row in chosen]
    draw_images(table.sample[chosen].tolist(), captions, index, preprocessing, path)


def draw_images(
    samples: Sequence[int], texts: Sequence[str], index: Index, preprocessing: Preprocessing, path: Path
) -> None:
    """Draw samples as the network sees them, each with a text below."""
    images, captions = [], []
    with closing(open_store(index, DownloadConfig())) as store:
        for sample, text in zip(samples, texts, strict=True):
            height, width = int(index.height[sample]), int(index.width[sample])
            side = max(1, round(min(height, width) * preprocessing.crop / preprocessing.resize))
            try:
                encoded = store.read(sample)
                seen = decode_region(encoded, (height - side) // 2, (width - side) // 2, side, side)
            except DataError:  # it was readable a moment ago
                continue
            images.append(resize(seen, preprocessing.crop, preprocessing.interpolation, False))
            captions.append(text)
    if images:
        write_sheet(path, images, captions)
    else:
        path.unlink(missing_ok=True)  # of an earlier evaluation


def describe(table: Table) -> Iterator[str]:
    """The metrics in words, a line each."""
    found = summarize(table)
    top5 = f"  top-5 {found['top5']:.2%}" if len(table.classes) > TOP else ""
    yield (
        f"top-1 {found['top1']:.2%}{top5}  of {found['images']:,} images  "
        f"NLL {found['nll']:.4f}  Brier {found['brier']:.4f}  ECE {found['ece']:.2%}  macro-F1 {found['macro_f1']:.4f}"
    )
    classes = per_class(table)
    present = np.flatnonzero(classes.count)
    order = present[np.argsort(classes.recall[present], kind="stable")]
    for what, some in (("worst", order[:_CLASSES]), ("best", order[::-1][:_CLASSES])):
        listed = ", ".join(f"{table.classes[label]} {classes.recall[label]:.1%}" for label in some)
        yield f"{what} classes by recall: {listed}"
    if pairs := worst_pairs(table, _PAIRS):
        yield "most frequent confusions:"
        yield from (f"  {label} taken for {other}: {times} of {total}" for label, other, times, total in pairs)
    where = "in this data" if table.training is None else "in training"
    for what, groups in (("image size", by_size(table)), (f"samples of the class {where}", by_frequency(table))):
        if len(groups) > 1:
            listed = "; ".join(f"{name}: {top1:.1%} of {count:,}" for name, count, top1 in groups)
            yield f"top-1 by {what}: {listed}"


def describe_comparison(found: Comparison, before: str, after: str) -> Iterator[str]:
    """The comparison in words, a line each."""
    gained, lost, total = int(found.gained.sum()), int(found.lost.sum()), len(found.samples)
    verdict = "a difference" if found.p_value < 0.05 else "no difference that chance would not explain"
    yield (
        f"{after} against {before}: {gained:,} images gained, {lost:,} lost of {total:,}, top-1 "
        f"{(gained - lost) / total:+.2%}; McNemar p = {found.p_value:.2g}: {verdict}"
    )
    if found.moved:
        moved = ", ".join(f"{name} {old:.1%} to {new:.1%}" for name, old, new in found.moved[:_PAIRS])
        yield f"classes that moved most, by recall: {moved}"
