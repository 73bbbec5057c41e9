"""The samples in one tar, and what becomes of every image in it: indexed, skipped with a reason, or an error."""

import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from distrain.data.image import ImageError, measure
from distrain.data.storage.sequential import SequentialReader
from distrain.data.vetting import Verdict, vet
from distrain.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LABEL_SUFFIXES = (".cls", ".json")
_OTHER_IMAGES = (
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".pnm", ".ppm",
    ".tif", ".tiff",
)  # fmt: skip
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")  # and RIFF....WEBP
SYSTEM_FOLDERS = {
    "__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found",
}  # fmt: skip
_CHUNK = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


class Image(NamedTuple):
    """An image in a tar; width and height are 0 if it cannot be decoded."""

    offset: int
    size: int
    width: int
    height: int
    crc32: int


@dataclass
class Members:
    """What a tar holds: samples by key, each with its members by suffix; (member, reason) of images not indexed and of
    images that cannot be decoded; how many of the others are of each of Pillow's modes."""

    samples: dict[str, dict[str, Image | bytes]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    undecodable: list[tuple[str, str]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)


class _Undecoded(NamedTuple):
    """An image in a tar that is entered into its sample once it has been decoded."""

    sample: dict[str, Image | bytes]
    suffix: str
    member: tarfile.TarInfo


_Read: TypeAlias = tuple[_Undecoded, bytes]


def read_members(reader: SequentialReader, shard: str, decode: bool, poll: Callable[[], None]) -> Members:
    """Group images and labels by WebDataset's rule: the key is the path up to the first dot of the file name.

    Without `decode` only the headers of images are parsed. `poll` is called for every member. Raises UserError for a
    sample that would be lost or mixed with another, TarError, OSError, TemporaryError if an image cannot be tried.
    """
    found = _Grouping(shard)
    images = _read_images(reader, shard, found, poll)
    for image, data, verdict in vet(images, poll) if decode else _parse_headers(images):
        found.enter(image, data, verdict)
    return found.finish()


def _parse_headers(images: Iterator[_Read]) -> Iterator[tuple[_Undecoded, bytes, Verdict]]:
    for image, data in images:
        try:
            width, height, mode = measure(data, decode=False)
            yield image, data, Verdict(width, height, mode=mode)
        except ImageError as error:
            yield image, data, Verdict(0, 0, str(error))


def _read_images(reader: SequentialReader, shard: str, found: "_Grouping", poll: Callable[[], None]) -> Iterator[_Read]:
    """Collect all members in `found`, and yield the images."""
    last = "the beginning"
    with tarfile.open(fileobj=reader, mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            poll()
            if not member.isdir():
                yield from found.add(member, reader)
            last = member.name
    if reader.last != bytes(_BLOCK):  # a tar ends with zero blocks, but tarfile treats anything invalid as the end
        raise UserError(f"{shard}: truncated or damaged after {last}; copy or write the shard again")
    while piece := reader.read(_CHUNK):
        poll()
        if piece.count(0) < len(piece):
            raise UserError(
                f"{shard}: holds more data after the end of the archive, such as another tar appended to it, which no "
                "reader sees; write it again as one tar"
            )


class _Grouping:
    """Collects the members of one tar."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._found = Members()
        self._names: dict[tuple[str, str], str] = {}  # of (key, suffix)
        self._further: list[tuple[str, str, str]] = []  # images with another suffix: member, key, what is wrong
        self._further_labels: set[str] = set()

    def add(self, member: tarfile.TarInfo, reader: SequentialReader) -> Iterator[_Read]:
        """Collect a member; yield it if it is an image, to be entered once it has been decoded."""
        folder, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        key = os.path.join(folder, stem)  # noqa: PTH118, not a local path
        suffix = f".{suffix.lower()}"
        known = suffix in (*IMAGE_SUFFIXES, *_LABEL_SUFFIXES)
        image = name.lower().endswith((*IMAGE_SUFFIXES, *_OTHER_IMAGES))
        if name.startswith(".") or not SYSTEM_FOLDERS.isdisjoint(folder.split("/")):
            if image:
                self._found.skipped.append((member.name, "hidden, or in a folder of the operating system"))
            return
        if not member.isreg() or member.issparse():
            if image or known:
                raise UserError(
                    f"{self._shard}: {member.name} is {_kind(member)}, not a stored file; {_rewrite(member)}"
                )
            return
        reader.seek(member.offset_data)
        if not known:
            image = image or _is_image(reader.read(min(16, member.size)))
            if image:
                self._further.append((member.name, key, _misnamed(suffix)))
            elif suffix.endswith(_LABEL_SUFFIXES):
                self._further_labels.add(_change_suffix(member.name, suffix[suffix.rindex(".") :]))
            return
        data = reader.read(member.size)
        if len(data) < member.size:
            raise UserError(f"{self._shard}: truncated inside {member.name}; copy or write the shard again")
        yield from self._add_known(member, key, suffix, data)

    def enter(self, image: _Undecoded, data: bytes, verdict: Verdict) -> None:
        """Enter an image into its sample."""
        if verdict.problem:
            self._found.undecodable.append((image.member.name, verdict.problem))
        else:
            self._found.modes[verdict.mode] += 1
        image.sample[image.suffix] = Image(
            image.member.offset_data, len(data), verdict.width, verdict.height, zlib.crc32(data)
        )

    def _add_known(self, member: tarfile.TarInfo, key: str, suffix: str, data: bytes) -> Iterator[_Read]:
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        before = self._names.setdefault((key, kind), member.name)
        sample = self._found.samples.setdefault(key, {})
        if before != member.name or suffix in sample:
            both = f"{before} and {member.name} have" if before != member.name else f"two members {before} have"
            raise UserError(
                f"{self._shard}: {both} the same key {key}, so one would be lost; "
                "give every sample its own name or folder"
            )
        if suffix in IMAGE_SUFFIXES:
            sample[suffix] = b""  # so that another one with its name is found
            yield _Undecoded(sample, suffix, member), data
        else:
            sample[suffix] = data

    def finish(self) -> Members:
        """Return what was found. Raises UserError for an image that belongs to no indexed sample."""
        for name, key, problem in self._further:
            sample = self._found.samples.get(key, {})
            label = _change_suffix(name, ".cls" if ".cls" in sample else ".json")
            if label in self._further_labels or not any(suffix in sample for suffix in IMAGE_SUFFIXES):
                raise UserError(f"{self._shard}: image {name} would be lost: {problem}")
            self._found.skipped.append((name, f"a further image of sample {key}"))
        return self._found


def _is_image(head: bytes) -> bool:
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _kind(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "a sparse file"
    return "a link" if member.islnk() or member.issym() else "a device or pipe"


def _rewrite(member: tarfile.TarInfo) -> str:
    option = "without --sparse" if member.issparse() else "with --dereference --hard-dereference"
    return f"write the shard again, with tar {option}"


def _change_suffix(name: str, suffix: str) -> str:
    return os.path.splitext(name)[0] + suffix  # noqa: PTH122, not a local path


def _misnamed(suffix: str) -> str:
    if suffix.count(".") > 1 and suffix.endswith(IMAGE_SUFFIXES):
        return "a sample's key ends at the first dot of the file name; rename it without further dots"
    return f"its suffix is not one of {', '.join(IMAGE_SUFFIXES)}; rename it, or convert it if it is another format"
