"""Shards given on the command line: paths, URLs and patterns of them."""

import logging
import os
import time
from collections.abc import Sequence
from glob import escape, glob, has_magic
from pathlib import Path

from distrain.data.index import is_remote
from distrain.data.storage.client import explain, list_urls
from distrain.data.storage.retry import TOOL_POLICY, TOOL_TIMEOUT
from distrain.errors import UserError
from distrain.files import resolve

_log = logging.getLogger(__name__)


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the paths and URLs of patterns: braces ({000..146}, {a,b}) expand, * and ? match.

    Brackets and braces of files and folders that exist are part of their names. Raises UserError, TemporaryError.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    found: list[str] = []
    for pattern in patterns:
        folder, rest = ("", pattern) if is_remote(pattern) else _split_existing(pattern)
        if not rest:
            found.append(folder)
            continue
        try:
            for each in braceexpand(rest):
                found += _glob(folder, each) if has_magic(each) else [folder + each]
        except UnbalancedBracesError as error:
            raise UserError(f"{pattern}: unbalanced braces") from error
    return found


def name_below(shard: str, folder: Path) -> str:
    """Return a shard's name in an index in `folder`: relative if below that folder, else an absolute path or URL."""
    if is_remote(shard):
        return shard
    path, root = resolve(shard), resolve(folder)
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _split_existing(pattern: str) -> tuple[str, str]:
    """Split a pattern after the longest beginning that names a file or folder."""
    if os.path.exists(pattern):  # noqa: PTH110, Path.exists raises for a long list in braces
        return pattern, ""
    folder = pattern
    while folder := folder.rpartition("/")[0]:
        if os.path.isdir(folder):  # noqa: PTH112
            return f"{folder}/", pattern[len(folder) + 1 :]
    return "", pattern


def _glob(folder: str, pattern: str) -> list[str]:
    whole = folder + pattern
    if not is_remote(whole):
        found = sorted(glob(escape(folder) + pattern))  # noqa: PTH207, Path.glob supports no absolute patterns
    elif whole.startswith("http"):
        return [whole]  # a web server has no listing, and a ? starts the query of a signed URL
    else:
        try:
            found = TOOL_POLICY.call(
                lambda: list_urls(whole, TOOL_TIMEOUT), time.sleep, lambda line: _log.warning("%s: %s", whole, line)
            )
        except OSError as error:
            raise explain(f"{whole}: cannot be listed", error) from error
    if not found:
        raise UserError(f"{whole}: no file matches")
    return found
