"""Command-line arguments of every tool that takes a model."""

import argparse
from pathlib import Path

from distrain.config.values import read_options
from distrain.data.shards.labels import read_classes
from distrain.export.load import load, load_any
from distrain.export.model import Model

MODEL_HELP = (
    "a run (runs/NAME[:best|last|STEP][:ema|raw]), weights (a file, a URL, torchvision[:V1|V2], timm:NAME) or an "
    "exported .onnx or .pt2 file"
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, and what weights that distrain did not write leave open."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--network", metavar="NAME", help="of weights that do not say of which network they are")
    parser.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="an option of that network; repeatable"
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="other class names for MODEL, a line each")


def load_model(args: argparse.Namespace, programs: bool = True) -> Model:
    """Load what `add_model_arguments` describe. Raises UserError; also for exported programs, if not `programs`."""
    options = read_options(args.option, "--option")
    classes = read_classes(args.classes) if args.classes else ()
    return (load_any if programs else load)(args.model, args.network, options or None, classes)
