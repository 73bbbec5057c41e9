"""The index of a data set: where each sample is stored. Built once, kept as one Parquet file next to the shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "width": np.int32,
    "height": np.int32,
    "crc32": np.uint32,
}


class Shard(NamedTuple):
    """A tar file: its name, relative to the index's folder, an absolute path or a URL; size in bytes; CRC-32."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """Sample i is `size[i]` bytes at `offset[i]` of the tar `shards[shard[i]]`.

    `root` is the folder of the index file, a path or a URL. Samples are in the order of `shards`. `crc32` is that of
    the encoded image; width and height are in pixels as stored (EXIF orientation not applied), both 0 for an image
    that could not be decoded when the index was built.

    `label` is [n], the class of each sample; or, of multi-label data, [n, m], the classes of each in ascending order,
    padded with -1 to the largest number that a sample has.
    """

    root: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    label: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.shard)

    def location(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        return locate(self.root, self.shards[shard].name)

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have any number of labels, also none, instead of one."""
        return self.label.ndim == 2

    def class_counts(self) -> NDArray[np.int64]:
        """Samples of each class, int64 [classes]."""
        return np.bincount(self.label[self.label >= 0], minlength=len(self.classes))

    def targets(self, samples: Sequence[int]) -> NDArray[np.int64] | NDArray[np.uint8]:
        """What the network should say of n samples: labels, int64 [n]; of multi-label data 1 for each label and 0 for
        each other class, uint8 [n, classes]."""
        labels = self.label[np.asarray(samples, np.int64)]
        if not self.multi_label:
            return labels.astype(np.int64)
        targets = np.zeros((len(labels), len(self.classes)), np.uint8)
        rows, columns = np.nonzero(labels >= 0)
        targets[rows, labels[rows, columns]] = 1
        return targets

    def limited(self, count: int) -> "Index":
        """Return this many of the samples, spread evenly over all; all if there are fewer."""
        kept = np.arange(min(count, len(self))) * len(self) // min(count, len(self))
        return replace(self, **{name: getattr(self, name)[kept] for name in COLUMNS})

    @cached_property
    def remote(self) -> bool:
        """Whether any shard has to be downloaded."""
        return any(is_remote(self.location(shard)) for shard in range(len(self.shards)))

    @cached_property
    def digest(self) -> str:
        """Identity of the data: equal for equal images, labels and order, wherever they are stored."""
        hasher = sha256(b"multi-label" if self.multi_label else b"")
        for name in ("label", "width", "height", "crc32"):
            hasher.update(getattr(self, name).tobytes())
        return hasher.hexdigest()[:16]


def pad_labels(labels: NDArray[np.int32], counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the `label` of multi-label data, int32 [n, m], from how many labels each sample has, int64 [n], and all of
    them in the order of the samples."""
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = np.full((len(counts), max(1, int(counts.max(initial=0)))), -1, np.int32)
    padded[rows, columns] = labels[np.lexsort((labels, rows))]
    return padded


def locate(root: str, name: str) -> str:
    """Return a shard's path or URL: absolute names unchanged, all others below `root`."""
    return name if is_remote(name) or name.startswith("/") else f"{root}/{name}"


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in location
