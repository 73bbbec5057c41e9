"""The index of a data set: where each sample lies. Built once, kept as one Parquet file beside the shards."""

import json
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.config import DataConfig
from distrain.data.transfer import Transfer
from distrain.errors import RankError, UserError

_FORMAT = 1
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
    """A tar file: its name, relative to the folder of the index or a whole URL; its bytes; their checksum."""

    name: str
    size: int
    crc32: int


@dataclass(frozen=True)
class Index:
    """Sample i is `size[i]` bytes at `offset[i]` of the tar `shards[shard[i]]`.

    `root` is the folder of the index file, a path or a URL. Samples lie in the order of `shards`. `crc32` is that
    of the encoded image, width and height are in pixels as stored (EXIF orientation not applied); both are 0 for
    an image that could not be read when the index was built.
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
        """Path or URL of a shard."""
        return locate(self.root, self.shards[shard].name)

    @cached_property
    def remote(self) -> bool:
        """Whether there are shards that have to be downloaded."""
        return any(is_remote(self.location(shard)) for shard in range(len(self.shards)))

    @cached_property
    def digest(self) -> str:
        """Identity of the data: equal for equal images, labels and order, wherever they lie."""
        hasher = sha256()
        for name in ("label", "width", "height", "crc32"):
            hasher.update(getattr(self, name).tobytes())
        return hasher.hexdigest()[:16]


def locate(root: str, name: str) -> str:
    """A shard's path or URL: a whole one as it is, any other below `root`."""
    return name if is_remote(name) or name.startswith("/") else f"{root}/{name}"


def is_remote(location: str) -> bool:
    """Whether this is a URL, as opposed to a path."""
    return "://" in location


def load(path: str, data: DataConfig | None = None) -> Index:
    """Read an index file from a path or URL; `data` tells how patient to be with a server.

    Raises UserError when it is missing or is no index, TransferError when the server fails at every attempt.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(BytesIO(_read_bytes(path, data or DataConfig())))
        header = json.loads(table.schema.metadata[b"distrain"])
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()}
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index that `python -m distrain shards` wrote") from error
    if header["format"] != _FORMAT:
        raise UserError(f"{path}: index format {header['format']} is not known here (format {_FORMAT} is)")
    if not len(table):
        raise UserError(f"{path}: the index holds no samples")
    outside = np.flatnonzero((columns["label"] < 0) | (columns["label"] >= len(header["classes"])))
    if len(outside):
        raise UserError(
            f"{path}: sample {outside[0]} has label {columns['label'][outside[0]]}, outside "
            f"0..{len(header['classes']) - 1}: index the shards again"
        )
    root = path.rpartition("/")[0] or "."
    return Index(root, tuple(Shard(*shard) for shard in header["shards"]), tuple(header["classes"]), **columns)


def save(index: Index, path: str | Path) -> None:
    """Write the index file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    header = {"format": _FORMAT, "shards": index.shards, "classes": index.classes}
    table = pyarrow.table({name: getattr(index, name) for name in COLUMNS})
    table = table.replace_schema_metadata({"distrain": json.dumps(header)})
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(table, draft)
    draft.replace(path)


def _read_bytes(path: str, data: DataConfig) -> bytes:
    missing = "no such index; make it with `python -m distrain shards` or set data.train and data.val"
    try:
        if is_remote(path):
            return Transfer(data.retries, data.retry_wait, data.stall, Event()).read(path, missing)
        return Path(path).read_bytes()
    except RankError as error:  # all ranks read the same index
        raise UserError(str(error)) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing}") from error
    except OSError as error:
        raise UserError(f"{path}: the index cannot be read: {error.strerror}") from error
