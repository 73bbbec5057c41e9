"""Index existing shards: each is read once, from start to end, holding one image in memory at a time."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import COLUMNS, Index, Shard, locate, pad_labels
from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.shards.labels import Kind, LabelReader, Readings, check_set, lists_numbers, split_labels
from distrain.data.shards.members import IMAGE_SUFFIXES, Image, Members, read_members
from distrain.data.storage.client import explain
from distrain.data.storage.sequential import SequentialReader, read_once
from distrain.errors import UserError

LABEL_KEYS = ("label", "labels", "cls")  # fields of .json that may hold the label, in this order
_FACTS = ("offset", "size", "width", "height", "crc32")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


@dataclass
class Notes:
    """What an index leaves out or training will skip: (image, reason) of each; shards without samples; pairs of shards
    with the same content, whose samples count twice."""

    skipped: list[tuple[str, str]] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    """How many images are of each of Pillow's modes."""


class ShardFacts(NamedTuple):
    """What one shard holds: for its n samples the columns of the index, [n] each, except `shard` and `label`; how many
    labels each has; all labels as they can be read; the keys; and the images that are not indexed."""

    shard: Shard
    columns: dict[str, NDArray[Any]]
    counts: NDArray[np.int64]
    labels: Readings
    keys: list[str]
    members: Members


class Labels(NamedTuple):
    """How labels are read; `key` is the only field of .json to read, if given; `multi` whether a sample may have any
    number of labels."""

    reader: LabelReader
    key: str | None = None
    multi: bool = False


NUMBERS = Labels(LabelReader(None))


def scan(
    root: str,
    shards: Sequence[str],
    classes: Sequence[str] | None = None,
    *,
    label_key: str | None = None,
    kind: Kind = "auto",
    multi_label: bool = False,
    workers: int = 1,
    done: Callable[[str], None] = lambda shard: None,
    notes: Notes | None = None,
) -> Index:
    """Index WebDataset shards (NAME.jpg, .png or .webp next to NAME.cls or .json), samples in stored order.

    `shards` are URLs, absolute paths or paths below `root`; `done` is called with each after it was read. Without
    `classes` the names are the numbers from 0 to the largest label. With `multi_label` a sample may have any number of
    labels, a list in .json or in .cls. An image that cannot be decoded gets width and height 0. `notes` are filled in
    the order of the shards. Raises UserError naming the shard, and the sample if one has no image or label or would be
    lost; TemporaryError if a server fails at every attempt.
    """
    labels = Labels(LabelReader(classes, kind), label_key, multi_label)
    notes = Notes() if notes is None else notes

    def read(shard: str, poll: Poll) -> ShardFacts:
        facts = read_shard(root, shard, labels, poll=poll)
        done(shard)
        return facts._replace(keys=[])

    found = []
    for facts in map_threads(read, shards, workers):
        for listed, images in ((notes.skipped, facts.members.skipped), (notes.undecodable, facts.members.undecodable)):
            listed += [(f"{facts.shard.name}: {name}", reason) for name, reason in images]
        notes.modes += facts.members.modes
        if not len(facts.counts):
            notes.empty.append(facts.shard.name)
        found.append(facts._replace(members=Members()))
    if len(notes.empty) == len(found):
        raise UserError(f"{root}: found no samples in {len(shards)} shards")
    notes.copies += _find_copies(found)
    readings = Readings(*(np.concatenate([facts.labels[reading] for facts in found]) for reading in (0, 1)))
    if not len(readings.number):
        raise UserError(f"{root}: no sample has a label")
    label = labels.reader.decide(readings, root)
    if classes is None:
        classes = [str(number) for number in range(int(label.max()) + 1)]
    return join(root, found, label, classes, multi_label)


def join(
    root: str, found: Sequence[ShardFacts], label: NDArray[np.int32], classes: Sequence[str], multi_label: bool
) -> Index:
    """Return the index of shards that have been read, in this order; `label` has the labels of all samples."""
    if multi_label:
        label = pad_labels(label, np.concatenate([facts.counts for facts in found]))
    counts = [len(facts.counts) for facts in found]
    columns = {name: np.concatenate([facts.columns[name] for facts in found]) for name in _FACTS}
    numbers = np.repeat(np.arange(len(found), dtype=np.int32), counts)
    return Index(root, tuple(facts.shard for facts in found), tuple(classes), shard=numbers, label=label, **columns)


def read_shard(
    root: str, name: str, labels: Labels = NUMBERS, decode: bool = True, poll: Poll = lambda: None
) -> ShardFacts:
    """Read one shard; without `decode` only the images' headers are parsed, for images known to decode.

    Raises UserError naming the shard, and the sample if one has no image or label or would be lost, TemporaryError.
    """
    if name.endswith(_COMPRESSED):
        raise UserError(f"{name}: compressed shards are not supported; decompress it to a plain .tar")

    def read(reader: SequentialReader) -> Members:
        try:
            return read_members(reader, name, decode, poll)
        except tarfile.TarError as error:
            raise UserError(f"{name}: shard cannot be read: {error}") from error

    try:
        members, size, crc32 = read_once(locate(root, name), read)
    except OSError as error:
        raise explain(f"{name}: shard cannot be read", error) from error
    rows, counts, readings = [], [], []
    for key, sample in members.samples.items():
        image, texts = _image_and_labels(f"{name}: sample {key}", sample, labels)
        rows.append(image)
        counts.append(len(texts))
        readings += [labels.reader.read(f"{name}: sample {key}", text) for text in texts]
    columns = {fact: np.array([getattr(image, fact) for image in rows], COLUMNS[fact]) for fact in _FACTS}
    read_as = np.array(readings, np.int32).reshape(-1, 2)
    keys = list(members.samples)
    members.samples.clear()
    numbers = np.array(counts, np.int64)
    return ShardFacts(Shard(name, size, crc32), columns, numbers, Readings(read_as[:, 0], read_as[:, 1]), keys, members)


def _find_copies(found: Sequence[ShardFacts]) -> list[tuple[str, str]]:
    names: dict[tuple[int, int], str] = {}
    shards = [facts.shard for facts in found if len(facts.counts)]
    pairs = [(names.setdefault((size, crc32), name), name) for name, size, crc32 in shards]
    return [(first, other) for first, other in pairs if first != other]


def _image_and_labels(where: str, sample: dict[str, Image | bytes], labels: Labels) -> tuple[Image, list[str]]:
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    found = _find_label(where, sample, labels.key)
    if not isinstance(image, Image) or found is None:
        source = f".json with {labels.key!r}" if labels.key else ".cls label, or a .json with one"
        raise UserError(f"{where} needs an image ({', '.join(IMAGE_SUFFIXES)}) and a {source}")
    if labels.multi:
        return image, check_set(where, found) if isinstance(found, list) else split_labels(where, found)
    if isinstance(found, list) or lists_numbers(found):
        raise UserError(
            f"{where} has label {found!r}, which is not a number or a name, but a list; pass --multi-label if images "
            "have several labels"
        )
    return image, [found]


def _find_label(where: str, sample: dict[str, Image | bytes], key: str | None) -> str | list[str] | None:
    """The label of a sample as text, or the list of them in its .json."""
    if key is None and isinstance(text := sample.get(".cls"), bytes):
        return text.decode("utf-8-sig", errors="replace").strip()
    if not isinstance(text := sample.get(".json"), bytes):
        return None
    try:
        content = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} has a .json that is not valid JSON: {error}") from error
    if not isinstance(content, list) or not all(isinstance(pair, tuple) for pair in content):
        return None
    for name in (key,) if key else LABEL_KEYS:
        values = [value for field, value in content if field == name]
        if len(values) > 1:
            raise UserError(f"{where} has a .json with {name!r} twice; keep one")
        if values:
            each = values[0] if isinstance(values[0], list) else values
            if any(isinstance(value, bool) or not isinstance(value, int | str) for value in each):
                raise UserError(f"{where} has a .json whose {name!r} is neither an integer nor text; correct it")
            texts = [str(value) for value in each]
            return texts if each is values[0] else texts[0]
    return None
