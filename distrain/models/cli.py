"""`python -m distrain models`: list, show and plot networks."""

import argparse
import ast
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch

from distrain.arguments import AnyOrder
from distrain.config.values import read_options
from distrain.errors import UserError
from distrain.models import PUBLISHED, Config, build, network_config
from distrain.models.complexity import Layer, count_complexity, total
from distrain.models.densenet import DenseNetConfig
from distrain.models.regnet import AnyNetConfig

_WIDTH = 100

_DESCRIPTION = """\
List the networks with their complexity and published accuracy, show the modules and options of one,
or plot its block widths. Nothing is trained or downloaded, and no GPU is needed."""

_EXAMPLES = """\
examples:
  python -m distrain models
  python -m distrain models show regnety_4gf --resolution 288
  python -m distrain models show densenet_bc_100_12 --num-classes 100 dropout=0.2
  python -m distrain models show regnet depth=8 w0=16 wa=12 wm=2.0 group_width=8 stem=cifar
  python -m distrain models show anynet 'stages=[{depth: 2, width: 64}, {depth: 4, width: 128}]'
  python -m distrain models plot regnetx_3_2gf --out widths.png"""

_LEGEND = """\
flops: multiply-adds for one image of 224 x 224 pixels (32 x 32 if the source is the paper).
acts: output elements of convolutions, max pooling and the classifier, for one image.
top-1: percent, single center crop, as published by the RegNet authors (pycls), the DenseNet
  authors' repository or their paper (CIFAR-10, crop and flip augmentation), or by torchvision
  (SWAG: pretrained on weakly supervised images).
V1, V2: accuracy of torchvision's weights for the same network; * requires width_rule=torchvision.
Also: densenet_DEPTH_GROWTH, densenet_b_..., densenet_c_... and densenet_bc_... of any depth and
growth rate, for small images; densenet, regnet and anynet, defined by options only.
`models show NAME` prints the complexity of each module of a network, and its options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands list, show and plot."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=_list)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=AnyOrder)
    commands.add_parser("list", help="list every published network (the default command)")
    show = commands.add_parser("show", help="show the complexity of each module of a network, and its options")
    _add_network(show)
    show.add_argument(
        "--resolution", type=int, metavar="PIXELS", help="image size (default: 224, or 32 with stem=cifar)"
    )
    show.add_argument(
        "--num-classes", type=int, metavar="N", help="classifier width (default: 1000, or 10 with stem=cifar)"
    )
    show.add_argument("--layers", action="store_true", help="print one row per layer instead of per block")
    show.set_defaults(run=_show)
    plot = commands.add_parser("plot", help="plot the block widths of a RegNet and their parametrization")
    _add_network(plot)
    plot.add_argument("--out", type=Path, metavar="FILE", help="image file: .png, .svg or .pdf (default: ./NAME.png)")
    plot.set_defaults(run=_plot)


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="network name, see `models list`")
    parser.add_argument("options", metavar="key=value", nargs="*", default=[], help="options, such as stem=cifar")


def _list(args: argparse.Namespace) -> int:
    print(f"{'name':<20}{'flops':>10}{'params':>10}{'acts':>10}{'top-1':>9}  {'source':<10}{'V1':>7}{'V2':>8}")
    for name, entry in PUBLISHED.items():
        weights = [entry.torchvision.get(version) for version in ("V1", "V2")]
        mark = "*" if entry.torchvision_rule else " "
        print(
            f"{name:<20}{_short(entry.cost.flops):>10}{_short(entry.cost.params):>10}"
            f"{_short(entry.cost.activations):>10}{entry.top1:>9.2f}  {entry.source:<10}"
            f"{''.join(f'{top1:>7.2f}{mark}' for top1 in weights if top1)}".rstrip()
        )
    print(f"\n{_LEGEND}")
    return 0


def _show(args: argparse.Namespace) -> int:
    options = read_options(args.options, "options:")
    config = network_config(args.name, **options)
    default_resolution, default_classes = (32, 10) if config.stem == "cifar" else (224, 1000)
    resolution = default_resolution if args.resolution is None else args.resolution
    num_classes = default_classes if args.num_classes is None else args.num_classes
    with torch.device("meta"):
        network = build(args.name, num_classes, **options)
    layers = count_complexity(network, resolution)
    cost = total(layers.values())
    print(
        f"{args.name}: {_short(cost.flops)} multiply-adds, {_short(cost.params)} parameters, "
        f"{_short(cost.activations)} activations"
    )
    print(f"for one image of {resolution} x {resolution} pixels, {num_classes} classes")
    if isinstance(network.config, AnyNetConfig):
        _print_stages(network.config)
    print(f"\n{'module':<28}{'output':>18}{'flops':>18}{'params':>16}{'activations':>18}")
    for name, members in groupby(layers.items(), lambda item: item[0] if args.layers else _block(item[0])):
        _print_row(name, [layer for _, layer in members])
    _print_row("total", layers.values())
    print("\noptions of this network (model.options in a run's configuration)")
    _print_options(config)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from distrain.models.plot import plot_widths

    config = network_config(args.name, **read_options(args.options, "options:"))
    if isinstance(config, (DenseNetConfig, AnyNetConfig)):
        raise UserError(f"model {args.name} is not a RegNet: plot needs one, such as regnety_4gf")
    path = args.out or Path(f"{args.name}.png")
    plot_widths(args.name, config, path)
    print(f"wrote {path}")
    return 0


def _print_stages(config: AnyNetConfig) -> None:
    for name in ("depth", "width", "group_width"):
        values = ", ".join(str(getattr(stage, name)) for stage in config.stages)
        print(textwrap.fill(f"{name} per stage: {values}", _WIDTH, subsequent_indent="  "))


def _print_row(name: str, layers: Iterable[Layer]) -> None:
    layers = list(layers)
    cost = total(layers)
    last = layers[-1]
    output = f"{last.width} x {last.size} x {last.size}" if last.size > 1 else f"{last.width}"
    print(f"{name:<28}{output:>18}{cost.flops:>18,}{cost.params:>16,}{cost.activations:>18,}")


def _print_options(config: Config) -> None:
    for name, text in _read_docstrings(type(config)).items():
        value = f"{name}={_as_yaml(getattr(config, name))}"
        print(textwrap.fill(value, _WIDTH, initial_indent="  ", subsequent_indent="    "))
        print(textwrap.fill(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _read_docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass and of its bases, by field name."""
    found: dict[str, str] = {}
    for base in kind.__mro__[:-1]:
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for entry, below in pairwise(body):
            if isinstance(entry, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[ast.unparse(entry.target)] = " ".join(ast.literal_eval(below.value).split())
    return found


def _as_yaml(value: Any) -> str:
    """Format a value as YAML: [6, 12] for (6, 12), true for True, {depth: 1, width: 8} for a stage."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if is_dataclass(value):
        return f"{{{', '.join(f'{entry.name}: {_as_yaml(getattr(value, entry.name))}' for entry in fields(value))}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _block(name: str) -> str:
    """Return the block of a layer, its name up to the last number: stages.0.1 for stages.0.1.se.reduce."""
    names = name.split(".")
    numbers = [index for index, entry in enumerate(names) if entry.isdigit()]
    return ".".join(names[: numbers[-1] + 1 if numbers else 1])


def _short(count: int) -> str:
    """Format a count with four digits and a unit: 15.91 G for 15911534044."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:#.4g} {unit}"
    return str(count)
