"""Command-line helpers: key=value arguments in any order, a run's arguments, and a check of the --json output file."""

import argparse
from pathlib import Path
from typing import Any

from distrain.errors import UserError


class AnyOrder(argparse.ArgumentParser):
    """A parser that accepts key=value before, between and after options; argparse expects positionals to be contiguous.

    Subcommands get the same parser. Commands that have subcommands or forward their remaining arguments are parsed in
    the usual order.
    """

    _is_inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        ordered = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        if ordered or self._is_inside:  # parse_known_intermixed_args calls this method again
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config FILE and key=value, which make up the configuration of a run."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, such as train.epochs=5")


def run_arguments(args: argparse.Namespace) -> list[str]:
    """The arguments of `add_run_arguments`, for the command line of another process."""
    return [*(["--config", args.config] if args.config else []), *args.overrides]


def check_writable(path: Path) -> None:
    """Raise UserError if the --json file cannot be written, before any results exist that could be lost."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from error
