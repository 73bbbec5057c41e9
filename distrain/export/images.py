"""The images that predict and export are given: files, folders, patterns, URLs, standard input."""

import glob
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event
from typing import NamedTuple

import torch

from distrain.data.image import ImageError
from distrain.data.index import is_remote
from distrain.data.storage.download import Downloader
from distrain.data.storage.retry import TOOL_POLICY, TOOL_TIMEOUT
from distrain.errors import TemporaryError, UserError
from distrain.export.classifier import read_image
from distrain.masking import mask_secrets

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp")


class NamedImage(NamedTuple):
    """An image, uint8 [1, 3, h, w], or the reason why there is none."""

    name: str
    pixels: torch.Tensor | None
    problem: str = ""


def list_images(arguments: Iterable[str]) -> Iterator[str]:
    """Yield the names of images: files and URLs as given, the images in folders and their sub-folders, files that match
    a pattern, and for - the lines of standard input.

    Raises UserError for a folder or a pattern without images.
    """
    for argument in arguments:
        if argument == "-":
            yield from list_images(line.rstrip("\n") for line in sys.stdin if line.strip())
        elif is_remote(argument):
            yield argument
        elif Path(argument).is_dir():
            found = sorted(
                path for path in Path(argument).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
            )
            if not found:
                raise UserError(f"{argument}: no images in this folder ({', '.join(SUFFIXES)})")
            yield from map(str, found)
        elif any(character in argument for character in "*?[") and not Path(argument).exists():
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207, patterns may be absolute
            if not matches:
                raise UserError(f"{argument}: no file matches this pattern")
            yield from list_images(matches)
        else:
            yield argument


def open_images(names: Iterable[str]) -> Iterator[NamedImage]:
    """Read and decode images by name."""
    for name in names:
        shown = mask_secrets(name)
        try:
            yield NamedImage(shown, read_image(_read(name)))
        except ImageError as error:
            yield NamedImage(shown, None, str(error))
        except OSError as error:
            yield NamedImage(shown, None, error.strerror or str(error))
        except (UserError, TemporaryError) as error:  # of a download
            yield NamedImage(shown, None, str(error).removeprefix(f"{shown}: "))


def _read(name: str) -> bytes:
    if is_remote(name):
        return Downloader(TOOL_POLICY, TOOL_TIMEOUT, Event()).read(name, "image not found")
    return Path(name).read_bytes()
