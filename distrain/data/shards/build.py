"""Build shards: shuffle the images of a data set once, write them as WebDataset tars of equal size, and index them.

The assignment of images to shards depends only on the list of images, the seed and the shard size, so any number of
workers writes the same bytes, and the same command completes a killed build: a shard gets its name only when it is
complete.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.image import suffix_of
from distrain.data.index import Index
from distrain.data.shards.drafts import create_json, draft, remove_abandoned
from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.shards.labels import composed
from distrain.data.shards.scan import NUMBERS, Labels, ShardFacts, join, read_shard
from distrain.data.shards.source_images import SourceImages
from distrain.data.storage.client import error_reason, explain, is_temporary
from distrain.data.storage.index_file import load_index, save_index
from distrain.data.vetting import vet
from distrain.errors import UserError, printable
from distrain.files import read_json, write_atomically
from distrain.rng import Stream, hash64

_FORMAT = 1
_BLOCK = (
    512  # of a tar: an image is padded to whole blocks and adds three: its header, its label and the label's header
)


class Sample(NamedTuple):
    """One sample of a shard: its key, the image's suffix without the dot, the encoded image, the label or labels."""

    key: str
    suffix: str
    image: bytes
    label: int | list[int]


@dataclass(frozen=True)
class Built:
    """The index, how many of its shards an earlier build had written, (name, reason) of each excluded image, and how
    many images are of each of Pillow's modes."""

    index: Index
    reused: int
    unreadable: list[tuple[str, str]]
    modes: Counter[str]


class _BuiltShard(NamedTuple):
    facts: ShardFacts | None
    reused: bool
    unreadable: list[tuple[str, str]]


def build(
    sources: SourceImages,
    out: Path,
    split: str,
    *,
    shard_bytes: int,
    seed: int = 0,
    workers: int = 1,
    done: Callable[[int], None] = lambda images: None,
) -> Built:
    """Write `out`/`split`-*.tar of about `shard_bytes` each, then `out`/`split`.parquet, reusing complete shards.

    Images that cannot be decoded are excluded and listed in `out`/`split`.unreadable.txt. `done` gets the number of
    images processed for each finished shard. Raises UserError when no image can be decoded, when `out` has the shards
    of a different build, or when it cannot be written; TemporaryError when an image cannot be read at present.
    """
    order = np.argsort(hash64(seed, Stream.ORDER, np.arange(len(sources))), kind="stable")
    starts = _split_evenly(sources.size[order], shard_bytes)
    digits = max(6, len(str(len(order) - 1)))
    index_file = out / f"{split}.parquet"

    def build_one(number: int, poll: Poll) -> _BuiltShard:
        first, end = starts[number], starts[number + 1]
        keys = {
            f"{position:0{digits}}_{_stem(sources.names[image])}": int(image)
            for position, image in enumerate(order[first:end], first)
        }
        shard = _build_shard(sources, out / f"{split}-{number:06d}.tar", index_file, keys, poll)
        done(end - first)
        return shard

    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_same_classes(out, split, sources.classes)
        _check_same_build(out / f"{split}.build.json", _build_record(sources, shard_bytes, seed))
        remove_abandoned(out, split)
        shards = list(map_threads(build_one, range(len(starts) - 1), workers))
        unreadable = [problem for shard in shards for problem in shard.unreadable]
        _list_unreadable(out / f"{split}.unreadable.txt", unreadable)
        found = [shard.facts for shard in shards if shard.facts is not None]
        if not found:
            name, reason = unreadable[0]
            raise UserError(f"{out}: none of the {len(sources):,} images can be read; the first: {name}: {reason}")
        label = np.concatenate([facts.labels.number for facts in found])
        index = join(str(out), found, label, sources.classes, sources.label.ndim == 2)
        save_index(index, index_file)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error_reason(error)}") from error
    modes = sum((facts.members.modes for facts in found), Counter())
    return Built(index, sum(shard.reused for shard in shards), unreadable, modes)


def write_shard(path: Path, samples: Iterable[Sample], index: Path) -> None:
    """Write a tar atomically; equal samples give equal bytes. An `index` of the shard it replaces is removed first.
    Raises OSError."""
    from webdataset import TarWriter

    with draft(path, index) as file, TarWriter(file, mtime=0, user="", group="", encoder=False) as writer:
        for key, suffix, image, label in samples:
            member = {"json": json.dumps({"labels": label})} if isinstance(label, list) else {"cls": str(label)}
            writer.write({"__key__": key, suffix: image, **{name: text.encode() for name, text in member.items()}})


def _build_shard(sources: SourceImages, path: Path, index: Path, keys: dict[str, int], poll: Poll) -> _BuiltShard:
    """Reuse an existing shard if it is complete, else write it, unless it would be empty."""
    unreadable: list[tuple[str, str]] = []
    out, name = path.parent, path.name
    facts = _read_existing(sources, out, name, keys, poll)
    if facts is not None:
        excluded = {key: keys[key] for key in keys.keys() - set(facts.keys)}
        if not list(_decodable(sources, dict(sorted(excluded.items())), unreadable, poll)):
            return _BuiltShard(facts._replace(keys=[]), True, unreadable)
        unreadable = []  # an image that could not be read then can be now

    samples = _decodable(sources, keys, unreadable, poll)
    first = next(samples, None)
    if first is None:
        return _BuiltShard(None, False, unreadable)
    write_shard(path, _chain(first, samples), index)
    facts = read_shard(str(out), name, _labels_of(sources), decode=False, poll=poll)
    return _BuiltShard(facts._replace(keys=[]), False, unreadable)


def _read_existing(sources: SourceImages, out: Path, name: str, keys: dict[str, int], poll: Poll) -> ShardFacts | None:
    """Return the content of an earlier build's shard, or None unless all of it belongs there."""
    try:
        written = (out / name).stat().st_mtime_ns
        facts = read_shard(str(out), name, _labels_of(sources), decode=False, poll=poll)
    except (FileNotFoundError, UserError):
        return None
    held = set(facts.keys)
    if [key for key in keys if key in held] != facts.keys:
        return None
    images = [keys[key] for key in facts.keys]
    if not np.array_equal(facts.columns["size"], sources.size[images]):
        return None
    labels = sources.label[images].reshape(len(images), -1)
    if not np.array_equal(facts.counts, (labels >= 0).sum(axis=1)):
        return None
    if not np.array_equal(facts.labels.number, labels[labels >= 0]):
        return None
    for image, crc32 in zip(images, facts.columns["crc32"].tolist(), strict=True):
        if sources.changed[image] > written and not _has_checksum(sources, image, crc32):
            return None
    return facts


def _labels_of(sources: SourceImages) -> Labels:
    return NUMBERS._replace(multi=sources.label.ndim == 2)


def _has_checksum(sources: SourceImages, image: int, crc32: int) -> bool:
    try:
        return zlib.crc32(sources.read(image)) == crc32
    except OSError:
        return False


def _decodable(
    sources: SourceImages, keys: dict[str, int], unreadable: list[tuple[str, str]], poll: Poll
) -> Iterator[Sample]:
    """Yield the samples whose images decode; append the others to `unreadable`."""

    def read() -> Iterator[tuple[tuple[str, int, str], bytes]]:
        for key, image in keys.items():
            poll()
            data, problem = b"", ""
            try:
                data = sources.read(image)
            except OSError as error:
                if is_temporary(error):
                    raise explain(sources.paths[image], error) from error
                problem = error_reason(error)
            yield (key, image, problem), data

    for (key, image, unread), data, verdict in vet(read(), poll):
        if problem := unread or verdict.problem:
            unreadable.append((sources.names[image], problem))
        else:
            label = sources.label[image]
            yield Sample(key, suffix_of(data), data, label[label >= 0].tolist() if label.ndim else int(label))


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _split_evenly(sizes: NDArray[np.int64], shard_bytes: int) -> list[int]:
    """Return the first image of each shard, and the end, for the fewest shards of equal size near `shard_bytes`."""
    ends = np.cumsum((-(-sizes // _BLOCK) + 3) * _BLOCK)
    shards = max(1, -(-int(ends[-1]) // shard_bytes))
    shard = (ends - 1) * shards // int(ends[-1])
    return [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(sizes)]


def _stem(name: str) -> str:
    """Return the file name as part of a key: without dots, which would end the key, and short enough for a tar."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]


def _build_record(sources: SourceImages, shard_bytes: int, seed: int) -> dict[str, Any]:
    """Return all that determines the bytes of a build."""
    hasher = sha256(json.dumps([sources.names, sources.classes]).encode())
    hasher.update(sources.size.tobytes() + sources.label.tobytes())
    if sources.label.ndim == 2:
        hasher.update(b"multi-label")
    return {
        "format": _FORMAT,
        "images": len(sources),
        "source": hasher.hexdigest()[:16],
        "shard_bytes": shard_bytes,
        "shuffle_seed": seed,
    }


def _check_same_build(file: Path, record: dict[str, Any]) -> None:
    """Write the record of this build, or raise UserError if it differs from that of another one in the folder, also
    of one that has begun at the same time."""
    if not file.exists():
        create_json(file, record)
    before = read_json(file, "delete it and run the build again")
    changed = [key for key, value in record.items() if before.get(key, value) != value]
    if changed:
        raise UserError(
            f"{file}: this folder has shards built from other images or settings ({', '.join(changed)} differ); "
            "choose another folder, or delete the split's files"
        )


def _check_same_classes(out: Path, split: str, classes: tuple[str, ...]) -> None:
    """Raise UserError if another split in the folder has different classes."""
    for other in sorted(out.glob("*.parquet")):
        existing = tuple(map(composed, load_index(str(other)).classes))
        if other.stem != split and existing != classes:
            differ = sorted(set(existing) ^ set(classes))
            detail = f"only one has {', '.join(map(printable, differ[:3]))}" if differ else "in a different order"
            raise UserError(
                f"{other}: has {len(existing):,} classes, {split} would have {len(classes):,}: {detail}; "
                "pass the same --classes FILE to both builds"
            )


def _list_unreadable(file: Path, unreadable: list[tuple[str, str]]) -> None:
    if unreadable:
        write_atomically(file, "".join(f"{printable(name)}: {reason}\n" for name, reason in unreadable))
    else:
        file.unlink(missing_ok=True)
