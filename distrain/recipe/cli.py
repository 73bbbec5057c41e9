"""`python -m distrain configs`: list, compare and check configurations."""

import argparse
import re
from pathlib import Path

from distrain import config
from distrain.arguments import AnyOrder
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.masking import mask_secrets

_DESCRIPTION = """\
List the configurations of published results with their cost and expected accuracy, show what differs
between two, or check that they can be trained. Nothing is trained or downloaded."""

_EXAMPLES = """\
examples:
  python -m distrain configs
  python -m distrain configs list configs/torchvision
  python -m distrain configs diff configs/pycls/regnety_16gf.yaml configs/torchvision/regnety_16gf_v2.yaml
  python -m distrain configs check"""

_LEGEND = """\
cost: multiply-adds of a training, 10^15: of forward and backward passes over all images of all epochs.
expected: as published by the source, which is the first line of each file.
status: where it was trained with distrain, and with which result."""

_FOLDER = Path("configs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands list, diff and check."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.set_defaults(run=_list, folder=_FOLDER)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=AnyOrder)
    listed = commands.add_parser("list", help="list the configurations in a folder (the default command)")
    listed.add_argument("folder", nargs="?", type=Path, default=_FOLDER, metavar="FOLDER", help="default: configs")
    listed.set_defaults(run=_list)
    diff = commands.add_parser("diff", help="print the settings in which two configurations differ")
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="a YAML file")
    diff.set_defaults(run=_diff)
    check = commands.add_parser("check", help="load configurations and rehearse a step of each without weights")
    check.add_argument("paths", nargs="*", type=Path, default=[_FOLDER], metavar="PATH", help="files or folders")
    check.set_defaults(run=_check)


def _list(args: argparse.Namespace) -> int:
    from distrain.recipe.catalog import read_catalog, training_cost

    print(f"{'configuration':<44}{'epochs':>7}{'batch':>7}{'cost':>9}  {'expected':<32}status")
    for entry in read_catalog(args.folder):
        settings, cost = entry.config, training_cost(entry.config)
        shown = "" if cost is None else f"{cost / 1e15:,.0f}" if cost >= 1e16 else f"{cost / 1e15:.2g}"
        name = str(entry.path.relative_to(args.folder).with_suffix(""))
        print(
            f"{name:<44}{settings.train.epochs:>7g}{settings.batch.size:>7}{shown:>9}  "
            f"{entry.expected.rstrip('.'):<32}{entry.status.rstrip('.')}",
            flush=True,
        )
    print(f"\n{_LEGEND}")
    return EXIT_DONE


def _diff(args: argparse.Namespace) -> int:
    a, b = (config.flatten(config.to_dict(config.load(path))) for path in (args.a, args.b))
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    rows = [(key, *(mask_secrets(str(side[key])) if key in side else "-" for side in (a, b))) for key in keys]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if not rows:
        print("no setting differs")
    return EXIT_DONE


def _check(args: argparse.Namespace) -> int:
    from distrain.cli import check_network
    from distrain.recipe.catalog import rehearse

    failed = checked = 0
    for path in (path for given in args.paths for path in (_runs_in(given) if given.is_dir() else [given])):
        checked += 1
        try:
            settings = config.load(path)
            check_network(settings)
            rehearse(settings)
        except (UserError, RuntimeError) as error:  # the latter of torch
            failed += 1
            print(f"{path}: {str(error).removeprefix(f'{path}: ')}")
    print(f"{checked - failed} of {checked} configurations can be trained")
    return EXIT_USER if failed else EXIT_DONE


def _runs_in(folder: Path) -> list[Path]:
    """The files of runs in a folder, and neither what others only extend nor design spaces."""
    files = sorted(folder.rglob("*.yaml"))
    return [path for path in files if re.search(r"^run:", path.read_text(errors="replace"), re.MULTILINE)]
