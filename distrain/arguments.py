"""What command lines have in common: key=value anywhere, figures written to a file."""

import argparse
from pathlib import Path
from typing import Any

from distrain.errors import UserError


class AnyOrder(argparse.ArgumentParser):
    """Takes key=value before, between and after options with dashes; argparse wants positional words in one place.

    For commands without subcommands; give it to `add_subparsers` as `parser_class`.
    """

    _is_inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._is_inside:  # argparse's own way to take them anywhere calls this again, and a subcommand has no other
            return super().parse_known_args(args, namespace)
        self._is_inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_inside = False


def check_writable(path: Path) -> None:
    """Raises UserError if the file that --json names cannot be written, before there are any figures to lose."""
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written: {error.strerror}") from error
