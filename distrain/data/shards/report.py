"""What the tools print about an index, what was left out of it, and how far they are."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distrain.data.index import Index
from distrain.data.storage.client import error_reason
from distrain.errors import UserError, printable
from distrain.masking import mask_secrets

_MODES = {"1": "gray", "L": "gray", "LA": "gray", "I": "gray", "I;16": "gray", "P": "palette", "PA": "palette"}
LISTED = 10  # images or classes listed on the console; a file next to the index lists all images


def print_images(images: list[tuple[str, str]], what: str) -> None:
    if images:
        print(f"{len(images):,} {what}")
        for name, reason in images[:LISTED]:
            print(mask_secrets(f"  {printable(name)}: {reason}"))


def print_contents(built: Index, modes: Counter[str]) -> None:
    """Say which images are not RGB as stored, `modes` counting images by Pillow's name of their mode, and which classes
    are empty."""
    counts: Counter[str] = Counter()
    for mode in sorted(modes):
        counts[_MODES.get(mode, mode)] += modes[mode]
    if other := [f"{count:,} {name}" for name, count in counts.items() if name != "RGB"]:
        print(f"read as RGB: {', '.join(other)} images")
    empty = np.flatnonzero(built.class_counts() == 0).tolist()
    if empty:
        names = ", ".join(built.classes[label] for label in empty[:LISTED])
        print(f"{len(empty):,} classes have no images: {names}{', ...' if len(empty) > LISTED else ''}")


def info(line: str) -> None:
    print(mask_secrets(printable(line)), flush=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into one line. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error_reason(error)}") from error


def summary(path: Path, built: Index) -> str:
    size = decimal(sum(shard.size for shard in built.shards))
    kind = f" ({np.count_nonzero(built.label >= 0) / len(built):.1f} labels per image)" if built.multi_label else ""
    counts = f"{len(built):,} images, {len(built.classes):,} classes{kind}, {len(built.shards):,} shards, {size}"
    return f"{printable(str(path))}: {counts}"


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a progress bar on standard error if that is a terminal; standard output can be redirected."""
    warnings.filterwarnings("ignore", module="PIL")  # warnings about files that decode are not useful here
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=True) as bar:
        yield bar
