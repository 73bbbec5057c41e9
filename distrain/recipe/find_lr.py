"""`python -m distrain find-lr`: the range of learning rates in which the loss falls (Smith 2017, section 3.3)."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from distrain import config
from distrain.arguments import add_run_arguments, check_writable
from distrain.cli import check_network
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError
from distrain.parallel.group import Group
from distrain.short_run import open_short_run
from distrain.train import train_step

_SMOOTHING = 0.9  # of the exponential moving average of the loss
_DIVERGED = 4.0  # times the lowest loss, beyond which larger learning rates are not tried

_DESCRIPTION = """\
Train a few steps with a learning rate that grows from step to step, and plot the loss against it. Where the
loss falls fastest is a good optimizer.lr; where it begins to rise is too much. Nothing else is changed or kept.
Works on one process."""

_EXAMPLES = """\
examples:
  python -m distrain find-lr --config configs/quickstart.yaml
  python -m distrain find-lr --config mine.yaml optimizer.name=adamw --from 1e-6 --to 0.1 --out lr.png"""


class Point(NamedTuple):
    lr: float
    loss: float
    """Smoothed over the steps so far."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of find-lr."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_run_arguments(parser)
    parser.add_argument("--from", type=float, default=1e-4, dest="low", metavar="LR", help="default: %(default)s")
    parser.add_argument("--to", type=float, default=10.0, dest="high", metavar="LR", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("lr.png"), metavar="FILE", help="default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Find the range, plot it and print what it says. Raises UserError for arguments that make no range."""
    if not 0 < args.low < args.high or args.steps < 10:
        raise UserError("--from must be above 0 and below --to, and --steps at least 10")
    settings = config.load(args.config, ["run.name=find-lr", *args.overrides])
    check_network(settings)
    check_writable(args.out, "--out")
    rates = np.geomspace(args.low, args.high, args.steps).tolist()
    points = measure(settings, rates)
    plot(points, args.out)
    steepest, lowest = suggest(points)
    print(f"the loss falls fastest at optimizer.lr={steepest:.2g}, and is lowest at {lowest:.2g}")
    print(f"wrote {args.out}")
    return EXIT_DONE


def measure(settings: Config, rates: Sequence[float]) -> list[Point]:
    """Train one step with each of these learning rates, until the loss diverges."""
    points: list[Point] = []
    mean = 0.0
    with Group() as group:
        if group.world > 1:
            raise UserError("find-lr works on one process: start it without torchrun", scope="all")
        with open_short_run(settings, group, print, len(rates)) as short:
            for step, lr in enumerate(rates):
                means, _ = train_step(short.learner, step, short.batches, lr)
                value = float(means["loss"])
                mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
                smooth = mean / (1 - _SMOOTHING ** (step + 1))
                if not math.isfinite(value) or smooth > _DIVERGED * min([smooth, *(point.loss for point in points)]):
                    break
                points.append(Point(lr, smooth))
    return points


def suggest(points: Sequence[Point]) -> tuple[float, float]:
    """Return the learning rate at which the loss falls fastest with its logarithm, and that at which it is lowest.

    Raises UserError if there are too few points.
    """
    if len(points) < 5:
        raise UserError("the loss has diverged within the first steps: set --from lower")
    rates, losses = np.array(points).T
    lowest = int(losses.argmin())
    slopes = np.gradient(losses, np.log(rates))[: max(2, lowest + 1)]
    return float(rates[int(slopes.argmin())]), float(rates[lowest])


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw the loss over the learning rate. Raises UserError if the file cannot be written."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([point.lr for point in points], [point.loss for point in points], color="#4878d0")
    if len(points) >= 5:
        steepest, _ = suggest(points)
        axes.axvline(steepest, color="#d65f5f", linestyle="--", label=f"falls fastest at {steepest:.2g}")
        axes.legend(frameon=False)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--out {path}: cannot be written: {error}") from error
