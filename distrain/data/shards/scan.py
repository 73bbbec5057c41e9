"""Index existing shards: each is read once, from start to end, holding one image in memory at a time."""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.image import ImageError, measure
from distrain.data.index import COLUMNS, Index, Shard, is_remote, locate
from distrain.data.storage.client import error_reason, list_urls
from distrain.data.storage.sequential import SequentialReader, read_once
from distrain.errors import UserError, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LABEL_KEYS = ("label", "cls")  # fields of .json that may hold the label, in this order
_BLOCK = tarfile.BLOCKSIZE
_MAX_CLASSES = 1_000_000  # a larger label is a mistake, where the number of classes is not given


class ShardFacts(NamedTuple):
    """What one shard holds: for its n samples the columns of the index, [n] each, except `shard`; and their keys."""

    shard: Shard
    columns: dict[str, NDArray[Any]]
    keys: list[str]


class Labels(NamedTuple):
    """How labels are read: `classes` are the names if known; `key` is the only field of .json to read, if given."""

    classes: Sequence[str] | None = None
    key: str | None = None


def scan(
    root: str,
    shards: Sequence[str],
    classes: Sequence[str] | None = None,
    *,
    label_key: str | None = None,
    workers: int = 1,
    done: Callable[[str], None] = lambda shard: None,
) -> Index:
    """Index WebDataset shards (NAME.jpg, .png or .webp next to NAME.cls or .json), samples in stored order.

    `shards` are URLs, absolute paths or paths below `root`; `done` is called with each after it was read. Without
    `classes` the names are the numbers from 0 to the largest label. An image that cannot be decoded gets width and
    height 0. Raises UserError naming the shard, and the sample if one has no image or label.
    """
    labels = Labels(classes, label_key)

    def read(shard: str) -> ShardFacts:
        facts = read_shard(root, shard, labels)._replace(keys=[])
        done(shard)
        return facts

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(read, shards))
    if not sum(len(facts.columns["label"]) for facts in found):
        raise UserError(f"{root}: found no samples in {len(shards)} shards")
    if classes is None:
        largest = max(int(facts.columns["label"].max(initial=0)) for facts in found)
        classes = [str(label) for label in range(largest + 1)]
    return join(root, found, classes)


def join(root: str, found: Sequence[ShardFacts], classes: Sequence[str]) -> Index:
    """Return the index of shards that have been read, in this order."""
    counts = [len(facts.columns["label"]) for facts in found]
    columns = {name: np.concatenate([facts.columns[name] for facts in found]) for name in COLUMNS if name != "shard"}
    numbers = np.repeat(np.arange(len(found), dtype=np.int32), counts)
    return Index(root, tuple(facts.shard for facts in found), tuple(classes), shard=numbers, **columns)


def read_shard(root: str, name: str, labels: Labels, decode: bool = True) -> ShardFacts:
    """Read one shard; without `decode` only the images' headers are parsed, for images known to decode.

    Raises UserError naming the shard, and the sample if one has no image or label.
    """
    if name.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
        raise UserError(f"{name}: compressed shards are not supported; decompress it to a plain .tar")

    def read(reader: SequentialReader) -> dict[str, _Members]:
        try:
            return _read_members(reader, name, decode)
        except tarfile.TarError as error:
            raise UserError(f"{name}: shard cannot be read: {error}") from error

    try:
        samples, size, crc32 = read_once(locate(root, name), read)
    except OSError as error:
        raise UserError(f"{name}: shard cannot be read: {error_reason(error)}") from error
    rows = [_row(f"{name}: sample {key}", members, labels) for key, members in samples.items()]
    facts = [name for name in COLUMNS if name != "shard"]
    values = zip(*rows, strict=True) if rows else ((),) * len(facts)
    columns = {fact: np.array(value, COLUMNS[fact]) for fact, value in zip(facts, values, strict=True)}
    return ShardFacts(Shard(name, size, crc32), columns, list(samples))


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the paths and URLs of patterns: braces ({000..146}, {a,b}) expand, * and ? match. Raises UserError."""
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    found: list[str] = []
    for pattern in patterns:
        try:
            for each in braceexpand(pattern):
                found += _glob(each) if has_magic(each) else [each]
        except UnbalancedBracesError as error:
            raise UserError(f"{pattern}: unbalanced braces") from error
    return found


def name_below(shard: str, folder: Path) -> str:
    """Return a shard's name in an index in `folder`: relative if below that folder, else an absolute path or URL."""
    if is_remote(shard):
        return shard
    path, root = Path(shard).resolve(), folder.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        found = sorted(glob(pattern))  # noqa: PTH207, Path.glob supports no absolute patterns
    elif pattern.startswith("http"):
        return [pattern]  # a web server has no listing, and a ? starts the query of a signed URL
    else:
        try:
            found = list_urls(pattern)
        except OSError as error:
            raise UserError(f"{pattern}: cannot be listed: {error_reason(error)}") from error
    if not found:
        raise UserError(f"{pattern}: no file matches")
    return found


class _Image(NamedTuple):
    offset: int
    size: int
    width: int
    height: int
    crc32: int


_Members = dict[str, _Image | bytes]


def _read_members(reader: SequentialReader, shard: str, decode: bool) -> dict[str, _Members]:
    """Group images and labels by WebDataset's rule: the key is the path up to the first dot of the file name."""
    samples: dict[str, _Members] = {}
    last = "the beginning"
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, suffix = name.partition(".")
            suffix = "." + suffix.lower()
            if member.isfile() and suffix in (*IMAGE_SUFFIXES, ".cls", ".json"):
                reader.seek(member.offset_data)
                data = reader.read(member.size)
                if len(data) < member.size:
                    raise UserError(f"{shard}: truncated inside {member.name}; copy or write the shard again")
                key = os.path.join(folder, stem)  # noqa: PTH118, not a local path
                samples.setdefault(key, {})[suffix] = (
                    _inspect(member.offset_data, data, decode) if suffix in IMAGE_SUFFIXES else data
                )
            last = member.name
    if reader.last != bytes(_BLOCK):  # a tar ends with zero blocks, but tarfile treats anything invalid as the end
        raise UserError(f"{shard}: truncated or damaged after {last}; copy or write the shard again")
    return samples


def _inspect(offset: int, data: bytes, decode: bool) -> _Image:
    try:
        width, height = measure(data, decode)
    except ImageError:
        width = height = 0
    return _Image(offset, len(data), width, height, zlib.crc32(data))


def _row(where: str, members: _Members, labels: Labels) -> tuple[int, ...]:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    text = _label_text(where, members, labels.key)
    if not isinstance(image, _Image) or text is None:
        source = f".json with {labels.key!r}" if labels.key else ".cls label, or a .json with one"
        raise UserError(f"{where} needs an image ({', '.join(IMAGE_SUFFIXES)}) and a {source}")
    return (image.offset, image.size, find_label(where, text, labels.classes), image.width, image.height, image.crc32)


def _label_text(where: str, members: _Members, key: str | None) -> str | None:
    if key is None and isinstance(text := members.get(".cls"), bytes):
        return text.decode(errors="replace").strip()
    if not isinstance(text := members.get(".json"), bytes):
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} has a .json that is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        return None
    return next((str(content[name]) for name in ((key,) if key else LABEL_KEYS) if name in content), None)


def find_label(where: str, text: str, classes: Sequence[str] | None) -> int:
    """Return the label given by a number or, if `classes` are known, by a class name. Raises UserError."""
    if re.fullmatch("[0-9]+", text):
        label, limit = int(text), _MAX_CLASSES if classes is None else len(classes)
        if label >= limit:
            raise UserError(f"{where} has label {label}, outside 0..{limit - 1}")
        return label
    if classes is None:
        raise UserError(f"{where} has label {text!r}, which is not a number; pass the list of classes to use names")
    if text not in classes:
        raise UserError(f"{where} has label {text!r}, which is neither a number nor a class: {nearest(text, classes)}")
    return classes.index(text)
