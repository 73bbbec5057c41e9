"""`python -m distrain sweep`: design spaces."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.arguments import AnyOrder
from distrain.config.values import ValueProblem, read_text
from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.sweep.space import Space

_EXAMPLES = """\
examples:
  python -m distrain sweep size configs/sweep/anynetx_a.yaml configs/sweep/regnetx.yaml
  python -m distrain sweep sample configs/sweep/regnetx_refined.yaml --n 20 --plot networks.png
  python -m distrain sweep sample configs/sweep/anynetx_e.yaml --image-size 32 --classes 10 \\
      --set stem=cifar --flops 4e6..6e6 --json
"""
_SIZE_DRAWS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands sample and size."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=AnyOrder, required=True)
    sample = commands.add_parser("sample", help="print networks of a design space, and draw them")
    _add_space(sample, "SPACE", None)
    sample.add_argument("--n", type=int, default=10, metavar="N", help="how many (default: 10)")
    sample.add_argument("--start", type=int, default=0, metavar="I", help="index of the first (default: 0)")
    sample.add_argument("--json", action="store_true", help="print a line of JSON for each, with its model.options")
    sample.add_argument("--plot", type=Path, metavar="FILE", help="draw the widths of their blocks: .png, .svg or .pdf")
    sample.set_defaults(run=_sample)
    size = commands.add_parser("size", help="say how many networks there are")
    _add_space(size, "SPACE", "+")
    size.set_defaults(run=_size)


def _add_space(parser: argparse.ArgumentParser, name: str, count: str | None) -> None:
    parser.add_argument("space", type=Path, metavar=name, nargs=count, help="file of a design space")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other networks (default: 0)")
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="for the cost (default: 224)")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="for the cost (default: 1000)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option that all networks share"
    )
    parser.add_argument("--flops", metavar="LOW..HIGH", help="multiply-adds for one image, instead of the file's")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="CONDITION", help="another condition, such as 'params < 5e6'"
    )


def _sample(args: argparse.Namespace) -> int:
    from distrain.sweep.sampling import Sampler

    if args.n < 1 or args.start < 0:
        raise UserError(f"--n {args.n} must be at least 1, and --start {args.start} at least 0")
    space = _load(args.space, args)
    sampler = Sampler(space, args.classes, args.image_size)
    samples = [sampler.sample(args.seed, index) for index in range(args.start, args.start + args.n)]
    if args.json:
        for sample in samples:
            print(json.dumps({**asdict(sample), "cost": asdict(sample.cost)}))
    else:
        names = [*samples[0].parameters]
        rows = [[_show(sample.parameters[name]) for name in names] for sample in samples]
        costs = [
            [f"{value / 1e6:.4g}M" for value in (s.cost.flops, s.cost.params, s.cost.conv_activations)] for s in samples
        ]
        indices = [[str(sample.index)] for sample in samples]
        _print_table(
            ["i", *names, "flops", "params", "acts"],
            [index + row + cost for index, row, cost in zip(indices, rows, costs, strict=True)],
        )
    if args.plot is not None:
        from distrain.sweep.plots import plot_samples

        plot_samples(space.name, samples, args.plot)
    return 0


def _size(args: argparse.Namespace) -> int:
    from scipy.stats import binomtest

    from distrain.sweep.sampling import Sampler

    for path in args.space:
        space = _load(path, args)
        count = space.count()
        if math.isinf(count):
            print(f"{space.name}: infinitely many, as a range has no step")
            continue
        line = f"{space.name}: 10^{math.log10(count):.1f} ways to draw"
        if space.conditions:
            accepted = Sampler(space, args.classes, args.image_size).accepted(args.seed, _SIZE_DRAWS)
            low, high = binomtest(accepted, _SIZE_DRAWS).proportion_ci(method="wilson")
            line += f", of which {accepted / _SIZE_DRAWS:.2%} fulfill the conditions"
            line += f" (95 % interval {low:.2%} to {high:.2%}, {_SIZE_DRAWS:,} drawn)"
        print(line)
    return 0


def _load(path: Path, args: argparse.Namespace) -> "Space":
    from distrain.sweep.space import load_space

    try:
        window = [float(text) for text in args.flops.split("..")] if args.flops else []
    except ValueError as error:
        raise UserError(f"--flops {args.flops}: write LOW..HIGH, such as 360e6..400e6") from error
    return load_space(path, parse_options(args.set), args.keep, window)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse OPTION=VALUE as `model.options` does. Raises UserError."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: write OPTION=VALUE, such as stem=cifar")
        try:
            options[name] = read_text(text, Any, name)
        except ValueProblem as error:
            raise UserError(f"--set {pair}: {error}") from error
    return options


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
