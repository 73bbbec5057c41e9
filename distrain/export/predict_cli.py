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
from distrain.export.load import Model
from distrain.sheet import write_sheet

EXIT_SKIPPED = 1  # some images could not be read
_SHEET_MAX = 100  # images

_DESCRIPTION = """\
Classify images. IMAGES are files, folders, patterns ('photos/**/*.jpg'), URLs, or - for a list of them on standard
input. Images that cannot be read are named on standard error and skipped; the exit code is then 1."""

_EXAMPLES = """\
examples:
  python -m distrain predict runs/mine photos
  python -m distrain predict mine.onnx photos --format csv > predictions.csv
  find photos -newer yesterday | python -m distrain predict runs/mine - --format jsonl
  python -m distrain predict runs/mine photos --sheet sheet.png --cam"""


class Prediction(NamedTuple):
    """The likeliest classes of an image with their probabilities, in descending order."""

    image: str
    classes: list[str]
    scores: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns, URLs, or -")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per image (default: %(default)s)")
    parser.add_argument(
        "--format", choices=list(_FORMATS), default="table", help="of the output (default: %(default)s)"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="also draw the images with their classes as a PNG")
    parser.add_argument("--cam", action="store_true", help="in the sheet, show where the evidence for the class lies")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError("--top must be at least 1")
    if args.cam and not args.sheet:
        raise UserError("--cam draws into a sheet: add --sheet FILE")
    model = load_model(args, programs=not args.cam)
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
            found, labels = classify(model, image.name, image.pixels, args.top)
            if args.sheet and len(views) < _SHEET_MAX:
                seen = view(preprocess, image.pixels)
                if isinstance(model, Classifier) and args.cam:
                    seen = overlay(seen, activation_map(model, image.pixels, labels[0]))
                views.append(seen)
                captions.append(f"{found.classes[0]} {found.scores[0]:.0%}")
            yield found

    _FORMATS[args.format](predictions(), args.top)
    if views:
        write_sheet(args.sheet, views, captions)
        print(f"wrote {args.sheet}", file=sys.stderr)
    return EXIT_SKIPPED if skipped else EXIT_DONE


@torch.no_grad()
def classify(model: Model, name: str, pixels: torch.Tensor, top: int) -> tuple[Prediction, list[int]]:
    """The likeliest classes of an image, uint8 [1, 3, h, w], by name and by number."""
    probabilities = model(pixels)[0].softmax(0)
    scores, labels = probabilities.topk(min(top, len(probabilities)))
    numbers = [int(label) for label in labels]
    return Prediction(name, [model.classes[number] for number in numbers], scores.tolist()), numbers


def _print_table(predictions: Iterator[Prediction], top: int) -> None:
    for found in predictions:
        ranked = "  ".join(f"{name} {score:.1%}" for name, score in zip(found.classes, found.scores, strict=True))
        print(f"{printable(found.image)}: {ranked}", flush=True)


def _print_jsonl(predictions: Iterator[Prediction], top: int) -> None:
    for found in predictions:
        print(json.dumps(found._asdict()), flush=True)


def _print_csv(predictions: Iterator[Prediction], top: int) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(["image", *(f"{kind}_{n}" for n in range(1, top + 1) for kind in ("class", "score"))])
    for found in predictions:
        pairs = zip(found.classes, found.scores, strict=True)
        writer.writerow([found.image, *(value for name, score in pairs for value in (name, f"{score:.6f}"))])


_FORMATS: dict[str, Callable[[Iterator[Prediction], int], None]] = {
    "table": _print_table,
    "jsonl": _print_jsonl,
    "csv": _print_csv,
}
