"""The index of a data set: where each sample is stored. Built once, kept as one Parquet file next to the shards."""

from dataclasses import dataclass
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

    @cached_property
    def remote(self) -> bool:
        """Whether any shard has to be downloaded."""
        return any(is_remote(self.location(shard)) for shard in range(len(self.shards)))

    @cached_property
    def digest(self) -> str:
        """Identity of the data: equal for equal images, labels and order, wherever they are stored."""
        hasher = sha256()
        for name in ("label", "width", "height", "crc32"):
            hasher.update(getattr(self, name).tobytes())
        return hasher.hexdigest()[:16]


def locate(root: str, name: str) -> str:
    """Return a shard's path or URL: absolute names unchanged, all others below `root`."""
    return name if is_remote(name) or name.startswith("/") else f"{root}/{name}"


def is_remote(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in location
