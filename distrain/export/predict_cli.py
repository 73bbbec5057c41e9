"""`python -m distrain predict`: classify images."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.errors import EXIT_DONE, UserError, printable
from distrain.export.activation import activation_map, overlay, view
from distrain.export.arguments import add_model_arguments, load_model
from distrain.export.classifier import Classifier, Preprocess
from distrain.export.images import list_images, open_images
from distrain.export.model import Model
from distrain.export.thresholds import HELP as THRESHOLDS
from distrain.export.thresholds import choose_thresholds
from distrain.sheet import write_sheet

EXIT_SKIPPED = 1  # some images could not be read
_SHEET_MAX = 100  # images
TOP = 5

_DESCRIPTION = """\
Classify images. IMAGES are files, folders, patterns ('photos/**/*.jpg'), URLs, or - for a list of them on standard
input. A multi-label model gives all labels whose probability is at least their threshold, 0.5 unless --thresholds or
the export says otherwise. Images that cannot be read are named on standard error and skipped; the exit code is
then 1."""

_EXAMPLES = """\
examples:
  python -m distrain predict runs/mine photos
  python -m distrain predict mine.onnx photos --format csv > predictions.csv
  find photos -newer yesterday | python -m distrain predict runs/mine - --format jsonl
  python -m distrain predict runs/mine photos --sheet sheet.png --cam"""


class Prediction(NamedTuple):
    """The likeliest classes of an image, or all of its labels, with their probabilities, in descending order."""

    image: str
    classes: list[str]
    scores: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns, URLs, or -")
    parser.add_argument(
        "--top", type=int, metavar="N", help="classes per image (default: 5, or all labels of a multi-label model)"
    )
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help=THRESHOLDS)
    parser.add_argument(
        "--format", choices=list(_FORMATS), default="table", help="of the output (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw the images with their classes as a PNG")
    parser.add_argument("--cam", action="store_true", help="in the sheet, show where the evidence for the class lies")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.top is not None and args.top < 1:
        raise UserError("--top must be at least 1")
    if args.cam and not args.sheet:
        raise UserError("--cam draws into a sheet: add --sheet FILE")
    model = load_model(args, programs=not args.cam)
    thresholds = choose_thresholds(args.thresholds, model)
    top = args.top or (len(model.classes) if model.multi_label else TOP)
    preprocess = Preprocess(model.preprocessing)
    views: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    skipped: list[str] = []

    def predictions() -> Iterator[Prediction]:
        for image in open_images(list_images(args.images)):
            if image.pixels is None:
                skipped.append(image.name)
                print(f"distrain: {printable(image.name)}: skipped: {image.problem}", file=sys.stderr)
                continue
            found, labels = classify(model, image.name, image.pixels, top)
            if model.multi_label:
                found = _above(found, thresholds[labels].tolist())
            if args.sheet and len(views) < _SHEET_MAX:
                seen = view(preprocess, image.pixels)
                if isinstance(model, Classifier) and args.cam:
                    seen = overlay(seen, activation_map(model, image.pixels, labels[0]))
                views.append(seen)
                captions.append(_caption(found, model.multi_label))
            yield found

    _FORMATS[args.format](predictions(), None if model.multi_label else top)
    if views:
        write_sheet(args.sheet, views, captions)
        print(f"wrote {args.sheet}", file=sys.stderr)
    return EXIT_SKIPPED if skipped else EXIT_DONE


@torch.no_grad()
def classify(model: Model, name: str, pixels: torch.Tensor, top: int) -> tuple[Prediction, list[int]]:
    """The likeliest classes of an image, uint8 [1, 3, h, w], by name and by number."""
    logits = model(pixels)[0]
    probabilities = logits.double().sigmoid().float() if model.multi_label else logits.softmax(0)
    scores, labels = probabilities.topk(min(top, len(probabilities)))
    numbers = [int(label) for label in labels]
    return Prediction(name, [model.classes[number] for number in numbers], scores.tolist()), numbers


def _above(found: Prediction, thresholds: list[float]) -> Prediction:
    """The classes whose score is at least their threshold."""
    rows = zip(found.classes, found.scores, thresholds, strict=True)
    kept = [(name, score) for name, score, threshold in rows if score >= threshold]
    return Prediction(found.image, [name for name, _ in kept], [score for _, score in kept])


def _caption(found: Prediction, multi_label: bool) -> str:
    pairs = list(zip(found.classes, found.scores, strict=True))
    return " ".join(f"{name} {score:.0%}" for name, score in (pairs if multi_label else pairs[:1])) or "no label"


def _print_table(predictions: Iterator[Prediction], top: int | None) -> None:
    for found in predictions:
        ranked = "  ".join(f"{name} {score:.1%}" for name, score in zip(found.classes, found.scores, strict=True))
        print(f"{printable(found.image)}: {ranked or 'no label'}", flush=True)


def _print_jsonl(predictions: Iterator[Prediction], top: int | None) -> None:
    for found in predictions:
        print(json.dumps(found._asdict()), flush=True)


def _print_csv(predictions: Iterator[Prediction], top: int | None) -> None:
    """A column per class and score; of any number of labels, `top` None, one for all, as `shards build` reads them."""
    writer = csv.writer(sys.stdout)
    if top is None:
        writer.writerow(["path", "labels", "scores"])
        for found in predictions:
            writer.writerow([found.image, ";".join(found.classes), ";".join(f"{score:.6f}" for score in found.scores)])
        return
    writer.writerow(["image", *(f"{kind}_{n}" for n in range(1, top + 1) for kind in ("class", "score"))])
    for found in predictions:
        pairs = zip(found.classes, found.scores, strict=True)
        writer.writerow([found.image, *(value for name, score in pairs for value in (name, f"{score:.6f}"))])


_FORMATS: dict[str, Callable[[Iterator[Prediction], int | None], None]] = {
    "table": _print_table,
    "jsonl": _print_jsonl,
    "csv": _print_csv,
}
