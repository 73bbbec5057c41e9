"""The index of a data set: where each sample lies. Built once, kept as one Parquet file beside the shards."""

import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMAT = 1
_COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "width": np.int32,
    "height": np.int32,
    "crc32": np.uint32,
}


@dataclass(frozen=True)
class Index:
    """Sample i is `size[i]` bytes at `offset[i]` of the tar `shards[shard[i]]`.

    Shard names are relative to `root`, the folder of the index file. `crc32` is that of the encoded image,
    width and height are in pixels as stored (EXIF orientation not applied).
    """

    root: Path
    shards: tuple[str, ...]
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

    @cached_property
    def digest(self) -> str:
        """Identity of the data: equal for equal images, labels and order, wherever they lie."""
        hasher = sha256()
        for name in ("label", "width", "height", "crc32"):
            hasher.update(getattr(self, name).tobytes())
        return hasher.hexdigest()[:16]


def load(path: str | Path) -> Index:
    """Read an index file. Raises UserError when it is missing or is no index."""
    import pyarrow
    import pyarrow.parquet

    path = Path(path)
    try:
        table = pyarrow.parquet.read_table(path)
        header = json.loads(table.schema.metadata[b"distrain"])
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in _COLUMNS.items()}
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such index; make it with `python -m distrain shards` or set data.train and data.val"
        ) from error
    except (OSError, pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index that `python -m distrain shards` wrote") from error
    if header["format"] != _FORMAT:
        raise UserError(f"{path}: index format {header['format']} is not known here (format {_FORMAT} is)")
    if not len(table):
        raise UserError(f"{path}: the index holds no samples")
    return Index(path.parent, tuple(header["shards"]), tuple(header["classes"]), **columns)


def save(index: Index, path: Path) -> None:
    """Write the index file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    header = {"format": _FORMAT, "shards": index.shards, "classes": index.classes}
    table = pyarrow.table({name: getattr(index, name) for name in _COLUMNS})
    table = table.replace_schema_metadata({"distrain": json.dumps(header)})
    draft = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(table, draft)
    draft.replace(path)


def build(root: Path, shards: list[str], classes: list[str]) -> Index:
    """Scan WebDataset shards (NAME.png or .jpg beside NAME.cls) into an index, in the order they lie.

    Raises UserError naming the shard and the sample when one has no label or is no readable image.
    """
    from PIL import Image

    rows: list[tuple[int, ...]] = []
    for number, shard in enumerate(shards):
        for key, members in _samples(root / shard):
            where = f"{shard}: sample {key}"
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if image is None or ".cls" not in members:
                raise UserError(f"{where} needs an image ({', '.join(IMAGE_SUFFIXES)}) and a .cls label")
            offset, data = image
            text = members[".cls"][1].decode(errors="replace").strip()
            if not text.isdecimal():
                raise UserError(f"{where} has label {text!r}, which is no number")
            label = int(text)
            if not 0 <= label < len(classes):
                raise UserError(f"{where} has label {label}, outside 0..{len(classes) - 1}")
            try:
                width, height = Image.open(BytesIO(data)).size
            except OSError as error:
                raise UserError(f"{where} is not a readable image") from error
            rows.append((number, offset, len(data), label, width, height, zlib.crc32(data)))
    if not rows:
        raise UserError(f"{root}: no samples in {len(shards)} shards")
    columns = {
        name: np.array(column, kind)
        for (name, kind), column in zip(_COLUMNS.items(), zip(*rows, strict=True), strict=True)
    }
    return Index(root, tuple(shards), tuple(classes), **columns)


def _samples(shard: Path) -> list[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Group a tar's members by WebDataset's rule: what stands before the first dot of the file name is the key."""
    samples: dict[str, dict[str, tuple[int, bytes]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    continue
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                parts = samples.setdefault(os.path.join(folder, stem), {})  # noqa: PTH118, not a path of this machine
                parts["." + suffix.lower()] = (member.offset_data, content.read())
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard}: shard cannot be read: {error}") from error
    return list(samples.items())
