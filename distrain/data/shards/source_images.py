"""The images that shards are built from, wherever they are listed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.storage.sequential import open_regular

LISTING_THREADS = 16  # listing waits for the file system, and a shared one serves many requests at once
Info = Callable[[str], None]


@dataclass(frozen=True)
class SourceImages:
    """Image i is `size[i]` bytes at `offset[i]` of the file `paths[i]`; `names[i]` is its name in messages and keys.

    `changed[i]` is when that file's content or name last changed, in nanoseconds of the epoch.
    `label` is as in `Index`.
    """

    names: list[str]
    paths: list[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    classes: tuple[str, ...]
    changed: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, image: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        # A million Paths would be large.
        with open(self.paths[image], "rb", buffering=0, opener=open_regular) as file:
            file.seek(int(self.offset[image]))
            data = file.read(int(self.size[image]))
        if len(data) != self.size[image]:
            raise OSError(f"read only {len(data)} of {self.size[image]} bytes")
        return data


class FoundImage(NamedTuple):
    """An image of `SourceImages`; device and inode tell whether two are the same file, 0 if that is not known."""

    name: str
    path: str
    offset: int
    size: int
    label: int | tuple[int, ...]
    """One, or a row of `Index.label`."""
    changed: int = 0
    device: int = 0
    inode: int = 0


def find_same_files(images: Sequence[FoundImage]) -> list[tuple[int, int]]:
    """Return (first, other) for every image that is the same file as an earlier one, in the order of the others."""
    inode = np.array([image.inode for image in images], np.uint64)
    order = np.argsort(inode, kind="stable")
    first = 0
    same: list[tuple[int, int]] = []
    for number in np.flatnonzero(np.diff(inode[order]) == 0).tolist():
        one, other = int(order[number]), int(order[number + 1])
        if images[one].inode and images[one].device == images[other].device:
            first = first if same and same[-1][1] == one else one
            same.append((first, other))
    return sorted(same, key=lambda pair: pair[1])


def collect(images: list[FoundImage], classes: Sequence[str]) -> SourceImages:
    """Return at least one image as columns."""
    names, paths, offset, size, label, changed, _, _ = zip(*images, strict=True)
    return SourceImages(
        list(names),
        list(paths),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(label, np.int32),
        tuple(classes),
        np.array(changed, np.int64),
    )
