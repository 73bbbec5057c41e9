"""Reading shards that exist into an index."""

import os
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from distrain.data.index import COLUMNS, Index, Shard, locate
from distrain.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def scan(root: str, shards: list[str], classes: list[str]) -> Index:
    """Scan WebDataset shards (NAME.png or .jpg beside NAME.cls) into an index, in the order they lie.

    Raises UserError naming the shard and the sample when one has no label or is no readable image.
    """
    from PIL import Image

    rows: list[tuple[int, ...]] = []
    for number, shard in enumerate(shards):
        for key, members in _samples(Path(locate(root, shard))):
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
        for (name, kind), column in zip(COLUMNS.items(), zip(*rows, strict=True), strict=True)
    }
    return Index(root, tuple(_describe(root, shard) for shard in shards), tuple(classes), **columns)


def _describe(root: str, name: str) -> Shard:
    content = Path(locate(root, name)).read_bytes()
    return Shard(name, len(content), zlib.crc32(content))


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
