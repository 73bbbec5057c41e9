"""`python -m distrain export`: write a trained classifier for other libraries and runtimes."""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch

from distrain.errors import EXIT_DONE, UserError
from distrain.export.arguments import add_model_arguments, load_model
from distrain.export.classifier import Classifier
from distrain.export.images import list_images, open_images
from distrain.export.thresholds import HELP as THRESHOLDS
from distrain.export.thresholds import choose_thresholds
from distrain.export.writers import TARGETS, export, fold_batch_norm

_MAX_IMAGES = 16

_DESCRIPTION = """\
Write a classifier for others. Default of a run: its best checkpoint, EMA weights if it has them.

  safetensors    weights by distrain's names; names of the classes, preprocessing and provenance beside them
  torchvision    a state_dict that torchvision's network of the same name loads
  timm           the same for timm
  torch_export   a program (.pt2) from uint8 images to logits: resize, crop and normalization are inside
  onnx           the same as ONNX
  mlflow         a folder for `mlflow models serve -m FOLDER` and mlflow.pyfunc.load_model

Programs take any number of images of any size. The file gets its name after what was written has been read
back and gives the same logits on the images of --images."""

_EXAMPLES = """\
examples:
  python -m distrain export runs/mine --to onnx --images IMAGES
  python -m distrain export runs/mine:last:raw --to torchvision --out mine.pth --images IMAGES"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model_arguments(parser)
    parser.add_argument("--to", required=True, choices=list(TARGETS), help="what to write")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file, or folder of mlflow; default: the model's name, here"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="real images to compare on; default: random pixels"
    )
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help=f"write them into the metadata: {THRESHOLDS}")
    parser.add_argument(
        "--fold", action="store_true", help="torch_export, onnx: fold BatchNorm into the convolutions before it"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.fold and args.to not in ("torch_export", "onnx"):
        raise UserError(f"--fold: {args.to} has names for BatchNorm only: use torch_export or onnx")
    classifier = load_model(args, programs=False)
    assert isinstance(classifier, Classifier)
    if args.thresholds is not None:
        classifier.record["thresholds"] = choose_thresholds(args.thresholds, classifier).tolist()
    path = args.out or Path(f"{_name_of(args.model)}{TARGETS[args.to]}")
    images = _images(args.images)
    written = classifier
    if args.fold:
        written = copy.deepcopy(classifier)
        print(f"folded {fold_batch_norm(written.network)} BatchNorms")
    difference = export(written, args.to, path, images, reference=classifier)
    what = f"{len(images)} images" if args.images else "random pixels (name some with --images)"
    size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    print(f"{path}: {size:,} bytes; on {what} logits differ by {difference:.1e} of the largest")
    return EXIT_DONE


def _images(arguments: list[str]) -> list[torch.Tensor]:
    if not arguments:
        pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 3, 300, 400), dtype=np.uint8)
        return list(torch.from_numpy(pixels))
    images = []
    for image in open_images(list_images(arguments)):
        if image.pixels is None:
            raise UserError(f"--images {image.name}: {image.problem}")
        images.append(image.pixels)
        if len(images) == _MAX_IMAGES:
            break
    return images


def _name_of(model: str) -> str:
    """runs/mine:best -> mine; dir/weights.pth -> weights; torchvision:V2 -> torchvision."""
    return Path(model.partition(":")[0] if "://" not in model else model.partition("?")[0]).stem or "model"
