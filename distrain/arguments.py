"""Command-line helpers: key=value arguments in any order, and a check of the --json output file."""

import argparse
from pathlib import Path
from typing import Any

from distrain.errors import UserError


class AnyOrder(argparse.ArgumentParser):
    """A parser that accepts key=value before, between and after options; argparse expects positionals to be contiguous.

    For commands without subcommands: pass it to `add_subparsers` as `parser_class`.
    """

    _is_inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_inside:  # parse_known_intermixed_args calls this method again
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def check_writable(path: Path) -> None:
    """Raise UserError if the --json file cannot be written, before any results exist that could be lost."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from error
