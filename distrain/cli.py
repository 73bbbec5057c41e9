"""The command line: training, and one tool per subject, whose code lives in the subject's package."""

import argparse
import importlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distrain import __version__
from distrain.arguments import AnyOrder, add_run_arguments
from distrain.errors import UserError
from distrain.masking import MaskingFormatter
from distrain.open_files import raise_open_files
from distrain.output import keep_writing
from distrain.parallel.environment import read_environment

if TYPE_CHECKING:
    from distrain.config import Config

TOOLS = {
    "models": ("distrain.models.cli", "list the networks, their cost and published accuracy"),
    "configs": ("distrain.recipe.cli", "list the configurations of published results, compare and check them"),
    "find-lr": ("distrain.recipe.find_lr", "find the range of learning rates in which the loss falls"),
    "bench": ("distrain.bench.cli", "measure loaders and training steps against peers and limits"),
    "launch": ("launch.cli", "start a run on one machine, many machines or a Slurm cluster"),
    "evaluate": ("distrain.evaluation.cli", "evaluate a classifier: accuracy, calibration, classes, confusions"),
    "predict": ("distrain.export.predict_cli", "classify images with a run, weights or an exported program"),
    "export": ("distrain.export.cli", "write a classifier for torchvision, timm, safetensors, torch.export or ONNX"),
    "checkpoints": ("distrain.checkpoint.cli", "list, verify, show and prune the checkpoints of a run"),
    "soak": ("distrain.soak.cli", "train under random faults and compare with an uninterrupted run"),
    "sweep": ("distrain.sweep.cli", "sample networks of design spaces, train them, find the best"),
    "shards": ("distrain.data.cli", "build, fetch, index, verify and preview training data"),
}

_OWN_SIGNALS = ("launch", "shards", "sweep")  # tools that handle SIGINT and SIGTERM themselves

_DESCRIPTION = """\
Train DenseNet and RegNet image classifiers, on one process or many nodes.
A run that was stopped or killed resumes when the same command is run again."""

_EXAMPLES = """\
first run, on real images:
  python -m distrain shards fetch cifar10 --out data/cifar10
  torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml

your own run, with any setting that --print-config lists:
  torchrun --nproc-per-node 8 -m distrain --config configs/quickstart.yaml \\
      run.name=mine model.name=regnety_400mf data.train=DIR/train.parquet data.val=DIR/val.parquet

tools (see python -m distrain TOOL --help):
"""

_EXIT_CODES = """
exit codes:
  0   done
  75  stopped on request (SIGTERM, SIGUSR1, Ctrl-C, a file `stop` in the run's folder, train.max_minutes),
      everything saved: run it again to continue
  78  a mistake in the configuration or the data, named by the message
  else a crash: run it again to continue from the last checkpoint
"""


def run(argv: Sequence[str]) -> int:
    """Run the command line and return the exit code. Raises UserError for mistakes in it."""
    if argv and argv[0] in TOOLS:
        module, summary = TOOLS[argv[0]]
        parser = AnyOrder(prog=f"distrain {argv[0]}", description=f"{summary[0].upper()}{summary[1:]}.")
        importlib.import_module(module).add_arguments(parser)
        args = parser.parse_args(argv[1:])
        if argv[0] in _OWN_SIGNALS:
            return int(args.run(args))
        from distrain.data.shards.interrupts import stop_on_signals

        with stop_on_signals("what it has written is kept, run the same command again"):
            return int(args.run(args))
    return _train(argv)


def _train(argv: Sequence[str]) -> int:
    tools = "".join(f"  {name:<11}  {summary}\n" for name, (_, summary) in TOOLS.items())
    parser = AnyOrder(
        prog="distrain",
        usage="torchrun [--nproc-per-node N ...] -m distrain --config FILE [key=value ...]\n"
        "       python -m distrain TOOL ...",
        description=_DESCRIPTION,
        epilog=_EXAMPLES + tools + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="check the configuration, print it with explanations, and exit",
    )
    parser.add_argument("--version", action="version", version=__version__)
    args = parser.parse_args(argv)
    if not args.config and not args.overrides:
        parser.error("nothing to train: give --config FILE, or see --help")

    from distrain import config
    from distrain.track.uri import tracking_uri

    loaded = config.load(args.config, args.overrides)
    world = read_environment().world
    config.check_ranks(loaded, world)
    raise_open_files(world)
    tracking_uri(loaded)
    check_network(loaded)
    if args.print_config:
        print(config.to_yaml(loaded), end="")
        return 0

    if loaded.train.dry_run:
        from distrain.dry_run import dry_run

        return dry_run(loaded)

    from distrain.train import train

    keep_writing()
    handler = logging.StreamHandler()
    handler.setFormatter(MaskingFormatter("distrain: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    return train(loaded)


def check_network(config: "Config") -> None:
    """Raises UserError for an unknown network, images that are too small for it, or names of parts that it does not
    have. Allocates no weights."""
    import torch

    from distrain import models
    from distrain.models.freezing import parameters_named

    with torch.device("meta"):
        network = models.build(config.model.name, config.model.num_classes, **config.model.options)
    try:
        models.check_resolution(network, min(config.data.train_sizes))
    except UserError as error:
        raise UserError(f"data.image_size or data.size_schedule: {error}") from error
    models.freeze(network, config.train.freeze)
    parameters_named(network, config.optimizer.no_decay, "optimizer.no_decay")
