"""Command-line helpers: key=value arguments in any order, a run's arguments, numbers, a check of the --json file."""

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
    return [*([f"--config={args.config}"] if args.config else []), *args.overrides]


def check_writable(path: Path, option: str = "--json") -> None:
    """Raise UserError if the file of an option cannot be written, before any results exist that could be lost."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}") from error


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    return _at_least(0, text)


def fraction(text: str) -> float:
    """A number between 0 and 1, exclusive, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _at_least(minimum: int, text: str) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
    return int(text)
