"""`python -m distrain sweep`: design spaces."""

import argparse
import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distrain.arguments import AnyOrder, fraction, natural, positive
from distrain.config.values import read_options
from distrain.errors import UserError
from distrain.files import translated_errors
from distrain.sweep.table import align

if TYPE_CHECKING:
    from distrain.sweep.population import Member
    from distrain.sweep.space import Space

_EXAMPLES = """\
examples:
  python -m distrain sweep run configs/sweep/anynetx_e.yaml configs/sweep/regnetx.yaml --n 25 --out runs/small \\
      --config configs/quickstart.yaml --set stem=cifar --flops 4e6..6e6 train.epochs=1
  python -m distrain sweep tune --config configs/quickstart.yaml --n 12 --out runs/tuned \\
      --vary optimizer.lr=log:0.01..1 --vary schedule.warmup_epochs=0..0.8
  python -m distrain sweep status runs/small
  python -m distrain sweep report runs/small --out report/index.html
  python -m distrain sweep best runs/small
  python -m distrain sweep fit --flops 400MF
  python -m distrain sweep fit --flops 1.6GF --like runs/small
  python -m distrain sweep size configs/sweep/anynetx_a.yaml configs/sweep/regnetx.yaml
  python -m distrain sweep sample configs/sweep/regnetx_refined.yaml --n 20
  python -m distrain sweep sample configs/sweep/anynetx_e.yaml --image-size 32 --classes 10 \\
      --set stem=cifar --flops 4e6..6e6 --json
"""
_SIZE_DRAWS = 2000
_FIT_SPACE = Path("configs/sweep/regnetx_refined.yaml")
_DRAWN = ("index", "network", "options", "parameters", "flops", "params", "activations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands run, tune, status, report, best, fit, sample and size."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=AnyOrder, required=True)
    train = commands.add_parser(
        "run", help="train the first networks of design spaces; any number of processes may run the same command"
    )
    train.add_argument(
        "words", nargs="+", metavar="SPACE... [key=value ...]", help="files of design spaces; settings of all runs"
    )
    _add_training(train, "networks of each space")
    train.add_argument("--member", type=natural, metavar="I", help="train only this one, counted over all spaces")
    _add_conditions(train)
    train.set_defaults(run=_run)
    tune = commands.add_parser("tune", help="search settings by the errors so far (optuna's TPE), or by --halve-at")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs, such as train.epochs=5")
    tune.add_argument(
        "--vary", action="append", required=True, metavar="KEY=RANGE",
        help="a setting and LOW..HIGH or log:LOW..HIGH, with :STEP for multiples of it, or choice:A,B,...",
    )  # fmt: skip
    _add_training(tune, "members in all")
    _add_seed(tune)
    tune.set_defaults(run=_tune)
    status = commands.add_parser("status", help="count the members that are done, and list those that failed")
    status.add_argument("folder", type=Path, metavar="DIR", help="folder of the sweep")
    status.set_defaults(run=_status)
    report = commands.add_parser(
        "report", help="compare the spaces of sweeps: error distributions, what good ones share"
    )
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of sweeps")
    report.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html"
    )
    report.set_defaults(run=_report)
    best = commands.add_parser("best", help="print the best networks of a sweep, as settings of a run")
    best.add_argument("folder", type=Path, metavar="DIR", help="folder of the sweep")
    best.add_argument("--n", type=positive, default=5, metavar="N", help="how many (default: 5)")
    best.set_defaults(run=_best)
    found = commands.add_parser("fit", help="find RegNets for a budget, shaped as the published ones or a sweep's best")
    _add_fit(found)
    sample = commands.add_parser("sample", help="print networks of a design space")
    sample.add_argument("space", type=Path, metavar="SPACE", help="file of a design space")
    _add_cost(sample)
    sample.add_argument("--n", type=positive, default=10, metavar="N", help="how many (default: 10)")
    sample.add_argument("--start", type=natural, default=0, metavar="I", help="index of the first (default: 0)")
    sample.add_argument("--json", action="store_true", help="print a line of JSON for each, with its model.options")
    sample.add_argument("--draw", type=Path, metavar="FILE", help="draw their widths to a PNG, SVG or PDF file")
    sample.set_defaults(run=_sample)
    size = commands.add_parser("size", help="count the networks of design spaces")
    size.add_argument("space", type=Path, nargs="+", metavar="SPACE", help="file of a design space")
    _add_cost(size)
    size.set_defaults(run=_size)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "space", type=Path, nargs="?", default=_FIT_SPACE, metavar="SPACE", help=f"of RegNets (default: {_FIT_SPACE})"
    )
    parser.add_argument(
        "--flops", required=True, metavar="BUDGET", help="multiply-adds for one image, such as 400MF, 1.6GF or 4e8"
    )
    parser.add_argument(
        "--tolerance", type=fraction, default=0.025, metavar="F", help="of the budget, as a fraction (default: 0.025)"
    )
    parser.add_argument(
        "--like", type=Path, metavar="DIR", help="sweep whose best quarter is the model (default: published RegNetX)"
    )
    parser.add_argument("--n", type=positive, default=5, metavar="N", help="how many at most (default: 5)")
    _add_image(parser)
    _add_options(parser)
    parser.set_defaults(run=_fit)


def _add_training(parser: argparse.ArgumentParser, counted: str) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of all runs, such as configs/quickstart.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--n", type=positive, default=10, metavar="N", help=f"{counted} (default: 10)")
    parser.add_argument("--workers", type=positive, metavar="N", help="at a time (default: one for each GPU, or core)")
    parser.add_argument(
        "--halve-at", default="", metavar="E,E...", help="successive halving: epochs after which only the best continue"
    )
    parser.add_argument("--fraction", type=fraction, default=1 / 3, metavar="F", help="that continue (default: 1/3)")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="another seed, other members (default: 0)")


def _add_cost(parser: argparse.ArgumentParser) -> None:
    _add_image(parser)
    _add_conditions(parser)


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-size", type=positive, default=224, metavar="PIXELS", help="for the cost (default: 224)"
    )
    parser.add_argument("--classes", type=positive, default=1000, metavar="N", help="for the cost (default: 1000)")


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    _add_seed(parser)
    parser.add_argument(
        "--flops", metavar="LOW..HIGH", help="multiply-adds for one image, such as 360MF..400MF, instead of the file's"
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option that all networks share"
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="CONDITION", help="another condition, such as 'params < 5e6'"
    )


def _run(args: argparse.Namespace) -> int:
    from distrain.sweep.commands import run

    paths = [Path(word) for word in args.words if "=" not in word]
    return run(args, [_load(path, args) for path in paths], [word for word in args.words if "=" in word])


def _tune(args: argparse.Namespace) -> int:
    from distrain.sweep.commands import tune

    return tune(args)


def _status(args: argparse.Namespace) -> int:
    from distrain.sweep.population import Status, by_space
    from distrain.sweep.statistics import errors_of
    from distrain.sweep.sweep import Sweep

    with translated_errors(args.folder):
        sweep = Sweep.open(args.folder)
        members, left, pace = sweep.current(), len(sweep.due()), sweep.pace()
    rows = [["space", *get_args(Status), "lowest error"]]
    for space, those in by_space(members).items():
        counts = Counter(member.status for member in those)
        errors = errors_of(those)
        lowest = f"{errors[0]:.2%}" if len(errors) else "-"
        rows.append([space, *(str(counts[status]) for status in get_args(Status)), lowest])
    for line in align(rows):
        print(line)
    if left:
        print(f"{left} left" + (f", about {left * pace / 60:.0f} min at the latest pace" if pace else ""))
    for member in members:
        if member.status == "failed":
            print(f"{member.name}: failed: {member.reason}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from distrain.sweep.population import by_space
    from distrain.sweep.report import describe, write_report
    from distrain.sweep.sweep import Sweep

    members: list[Member] = []
    for folder in args.folders:
        with translated_errors(folder):
            members += Sweep.open(folder).current()
    spaces = by_space(members)
    about = {"sweeps": ", ".join(map(str, args.folders))}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_report(spaces, args.out, about)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from error
    for line in describe(spaces):
        print(line)
    print(f"wrote {args.out}")
    return 0


def _best(args: argparse.Namespace) -> int:
    from distrain.sweep.sweep import Sweep

    with translated_errors(args.folder):
        members = Sweep.open(args.folder).current()
    done = [member for member in members if member.status == "done" and member.error is not None]
    if not done:
        raise UserError(f"{args.folder}: no member is done yet: see python -m distrain sweep status {args.folder}")
    for member in sorted(done, key=lambda member: member.error or 0.0)[: args.n]:
        print(f"# {member.name}: error {member.error:.2%}, {member.flops / 1e6:.4g} M multiply-adds")
        print(_settings(member))
    return 0


def _settings(member: "Member") -> str:
    """What distinguishes its run, for a shell."""
    return " ".join(map(shlex.quote, member.arguments))


def _fit(args: argparse.Namespace) -> int:
    from distrain.sweep.fit import best_shape, fit, published_shape, regnet_config
    from distrain.sweep.space import load_space, read_flops
    from distrain.sweep.sweep import Sweep

    budget = read_flops(args.flops, f"--flops {args.flops}")
    if not 0 < budget < math.inf:
        raise UserError(f"--flops {args.flops}: must be above 0 and finite")
    window = [(1 - args.tolerance) * budget, (1 + args.tolerance) * budget]
    space = load_space(args.space, read_options(args.set, "--set"), args.keep, window)
    shape = published_shape(budget)
    if args.like:
        with translated_errors(args.like):
            shape = best_shape(Sweep.open(args.like).current())
    members = fit(space, shape, budget, args.n, args.classes, args.image_size)
    rows = [["i", *members[0].parameters, "flops", "params", "acts", "widths", "depths"]]
    for member in members:
        stages = regnet_config(member).stages()
        shown = (",".join(str(getattr(stage, name)) for stage in stages) for name in ("width", "depth"))
        rows.append([*_row(member), *shown])
    for line in [*align(rows), *map(_settings, members)]:
        print(line)
    return 0


def _sample(args: argparse.Namespace) -> int:
    from distrain.sweep.sampling import Sampler

    space = _load(args.space, args)
    sampler = Sampler(space, args.classes, args.image_size)
    samples = [sampler.sample(args.seed, index) for index in range(args.start, args.start + args.n)]
    if args.json:
        for sample in samples:
            print(json.dumps({name: getattr(sample, name) for name in _DRAWN}))
        return 0
    for line in align([["i", *samples[0].parameters, "flops", "params", "acts"], *map(_row, samples)]):
        print(line)
    if args.draw is not None:
        _draw(samples, args.draw)
    return 0


def _draw(samples: "Sequence[Member]", path: Path) -> None:
    from distrain.sweep.plots import draw_networks
    from distrain.sweep.structure import channels

    titles = (f"{sample.index}: {sample.flops / 1e6:.4g}M" for sample in samples)
    figure = draw_networks(dict(zip(titles, map(channels, samples), strict=True)))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # of an unknown suffix
        raise UserError(f"--draw {path}: cannot be written: {error}") from error
    print(f"wrote {path}")


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
    from distrain.sweep.space import load_space, read_flops

    window = [read_flops(text, f"--flops {args.flops}") for text in args.flops.split("..")] if args.flops else []
    return load_space(path, read_options(args.set, "--set"), args.keep, window)


def _row(member: "Member") -> list[str]:
    costs = (f"{count / 1e6:.4g}M" for count in (member.flops, member.params, member.activations))
    return [str(member.index), *map(_show, member.parameters.values()), *costs]


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
