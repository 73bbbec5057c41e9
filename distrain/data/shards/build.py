"""Making shards: the images of a data set, shuffled once, as WebDataset tars of equal size, and their index.

Which image goes where follows from the list of images, the seed and the shard size alone, so any number of
workers writes the same bytes, and a build that was killed is finished by the same command: a shard has its
name only once it is whole.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.image import ImageError, check
from distrain.data.index import Index
from distrain.data.shards.scan import Labels, ShardFacts, join, read_shard
from distrain.data.shards.sources import SourceImages
from distrain.data.storage.index_file import load_index, save_index
from distrain.data.storage.sequential import error_reason
from distrain.errors import UserError
from distrain.rng import Stream, hash64

_FORMAT = 1
_BLOCK = 512  # of a tar: each image is filled up to whole ones, and has a header, a label and the label's header


class Sample(NamedTuple):
    """One sample of a shard: its key, the image's suffix without the dot, the encoded image, the label."""

    key: str
    suffix: str
    image: bytes
    label: int


class Built(NamedTuple):
    """The whole index, how many of its shards were there before, and (name, reason) of each image kept out."""

    whole: Index
    reused: int
    unreadable: list[tuple[str, str]]


class _Made(NamedTuple):
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
    """Write `out`/`split`-*.tar of about `shard_bytes` each, then `out`/`split`.parquet, keeping what is whole.

    Images that cannot be decoded are kept out, and listed in `out`/`split`.unreadable.txt. `done` hears how many
    images each finished shard accounts for. Raises UserError when no image can be decoded, when `out` holds the
    shards of another build, or when it cannot be written.
    """
    order = np.argsort(hash64(seed, Stream.ORDER, np.arange(len(sources))), kind="stable")
    starts = _cut(sources.size[order], shard_bytes)
    digits = max(6, len(str(len(order) - 1)))

    def make(number: int) -> _Made:
        first, end = starts[number], starts[number + 1]
        keys = {
            f"{place:0{digits}}_{_stem(sources.names[image])}": int(image)
            for place, image in enumerate(order[first:end], first)
        }
        made = _make_shard(sources, out, f"{split}-{number:06d}.tar", keys)
        done(end - first)
        return made

    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_same_classes(out, split, sources.classes)
        _check_same_build(out / f"{split}.build.json", _describe(sources, shard_bytes, seed))
        with ThreadPoolExecutor(workers) as pool:
            made = list(pool.map(make, range(len(starts) - 1)))
        unreadable = [problem for shard in made for problem in shard.unreadable]
        _list_unreadable(out / f"{split}.unreadable.txt", unreadable)
        found = [shard.facts for shard in made if shard.facts is not None]
        if not found:
            name, reason = unreadable[0]
            raise UserError(f"{out}: none of the {len(sources):,} images can be read; the first is {name}: {reason}")
        built = join(str(out), found, sources.classes)
        save_index(built, out / f"{split}.parquet")
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error_reason(error)}") from error
    return Built(built, sum(shard.reused for shard in made), unreadable)


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar, whole or not at all; equal samples give equal bytes. Raises OSError."""
    from webdataset import TarWriter

    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            with TarWriter(file, mtime=0, user="", group="", encoder=False) as writer:
                for key, suffix, image, label in samples:
                    writer.write({"__key__": key, suffix: image, "cls": str(label).encode()})
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _make_shard(sources: SourceImages, out: Path, name: str, keys: dict[str, int]) -> _Made:
    """Keep the shard that is there if it is whole, else write it; an empty one is not written."""
    unreadable: list[tuple[str, str]] = []
    facts = _read_own(sources, out, name, keys)
    if facts is not None:
        left_out = {key: keys[key] for key in keys.keys() - set(facts.keys)}
        if not list(_decodable(sources, dict(sorted(left_out.items())), unreadable)):
            return _Made(facts._replace(keys=[]), True, unreadable)
        unreadable = []  # what could not be read then can be now

    samples = _decodable(sources, keys, unreadable)
    first = next(samples, None)
    if first is None:
        return _Made(None, False, unreadable)
    write_shard(out / name, _chain(first, samples))
    facts = read_shard(str(out), name, Labels(), decode=False)
    return _Made(facts._replace(keys=[]), False, unreadable)


def _read_own(sources: SourceImages, out: Path, name: str, keys: dict[str, int]) -> ShardFacts | None:
    """What a shard of an earlier attempt holds, or None unless all of it is what belongs there."""
    if not (out / name).exists():
        return None
    try:
        facts = read_shard(str(out), name, Labels(), decode=False)
    except UserError:
        return None
    held = set(facts.keys)
    if [key for key in keys if key in held] != facts.keys:
        return None
    images = [keys[key] for key in facts.keys]
    same = all(np.array_equal(facts.columns[fact], getattr(sources, fact)[images]) for fact in ("size", "label"))
    return facts if same else None


def _decodable(sources: SourceImages, keys: dict[str, int], unreadable: list[tuple[str, str]]) -> Iterator[Sample]:
    """The samples whose images decode; the others are added to `unreadable`."""
    for key, image in keys.items():
        try:
            data = sources.read(image)
            suffix = check(data)
        except (OSError, ImageError) as error:
            unreadable.append((sources.names[image], error_reason(error)))
        else:
            yield Sample(key, suffix, data, int(sources.label[image]))


def _chain(first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _cut(sizes: NDArray[np.int64], shard_bytes: int) -> list[int]:
    """Where each shard begins, and the end: the fewest shards that stay near `shard_bytes`, of equal size."""
    ends = np.cumsum((-(-sizes // _BLOCK) + 3) * _BLOCK)
    shards = max(1, -(-int(ends[-1]) // shard_bytes))
    shard = (ends - 1) * shards // int(ends[-1])
    return [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(sizes)]


def _stem(name: str) -> str:
    """The file's own name as far as a key can hold it: without dots, which end a key, and short enough for a tar."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(name).stem)[:60]


def _describe(sources: SourceImages, shard_bytes: int, seed: int) -> dict[str, Any]:
    """What the bytes of a build follow from."""
    hasher = sha256(json.dumps([sources.names, sources.classes]).encode())
    hasher.update(sources.size.tobytes() + sources.label.tobytes())
    return {
        "format": _FORMAT,
        "images": len(sources),
        "source": hasher.hexdigest()[:16],
        "shard_bytes": shard_bytes,
        "shuffle_seed": seed,
    }


def _check_same_build(file: Path, described: dict[str, Any]) -> None:
    """Note what is built here, or refuse to mix it with what was built here before."""
    if file.exists():
        before = json.loads(file.read_text() or "{}")  # a power cut may leave it empty
        changed = [key for key, value in described.items() if before.get(key, value) != value]
        if changed:
            raise UserError(
                f"{file}: shards were built here from other images or settings ({', '.join(changed)} differ); "
                "take another folder, or delete the split's files"
            )
    draft = file.with_name(file.name + ".tmp")
    draft.write_text(json.dumps(described) + "\n")
    draft.replace(file)


def _check_same_classes(out: Path, split: str, classes: tuple[str, ...]) -> None:
    """Refuse a split whose labels would mean other classes than those of the split beside it."""
    for other in sorted(out.glob("*.parquet")):
        theirs = load_index(str(other)).classes
        if other.stem != split and theirs != classes:
            differ = sorted(set(theirs) ^ set(classes))
            detail = f"only one has {', '.join(differ[:3])}" if differ else "in another order"
            raise UserError(
                f"{other}: has {len(theirs):,} classes, {split} would have {len(classes):,}: {detail}; "
                "name the classes of both with --classes FILE"
            )


def _list_unreadable(file: Path, unreadable: list[tuple[str, str]]) -> None:
    if unreadable:
        file.write_text("".join(f"{name}: {reason}\n" for name, reason in unreadable))
    else:
        file.unlink(missing_ok=True)
