"""Find the images of a data set that shards are built from: a folder, a list, or the original tars of ImageNet."""

import csv
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.scan import find_label
from distrain.data.storage.client import error_reason
from distrain.errors import UserError, nearest

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test"}
_LISTING_THREADS = 16  # listing waits for the file system, and a shared one serves many requests at once


@dataclass(frozen=True)
class SourceImages:
    """Image i is `size[i]` bytes at `offset[i]` of the file `paths[i]`; `names[i]` is its name in messages and keys."""

    names: list[str]
    paths: list[str]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label: NDArray[np.int32]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, image: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        with open(self.paths[image], "rb", buffering=0) as file:  # noqa: PTH123, a million Paths would be large
            file.seek(int(self.offset[image]))
            data = file.read(int(self.size[image]))
        if len(data) != self.size[image]:
            raise OSError(f"read only {len(data)} of {self.size[image]} bytes")
        return data


class _Found(NamedTuple):
    name: str
    path: str
    offset: int
    size: int
    label: int


def find(source: Path, split: str, classes: Sequence[str] | None = None, devkit: Path | None = None) -> SourceImages:
    """List the images of `source`, which is a folder, a list or a tar of ImageNet. Raises UserError.

    The order of `classes` defines the labels; without it classes are sorted by name.
    """
    if source.is_file() and source.suffix == ".csv":
        return read_csv(source, classes)
    if source.is_file() and source.suffix == ".tar":
        return _read_ilsvrc(source, split, classes, devkit or source.parent / DEVKIT)
    if not source.is_dir():
        problem = "neither a folder nor a .csv or .tar file" if source.exists() else "file or folder not found"
        raise UserError(f"{source}: {problem}")
    archive = source / f"ILSVRC2012_img_{split}.tar"
    if archive.is_file():
        return _read_ilsvrc(archive, split, classes, devkit or source / DEVKIT)
    return read_folder(source, classes)


def read_folder(folder: Path, classes: Sequence[str] | None = None) -> SourceImages:
    """List a folder with a sub-folder per class, named after it; images anywhere below. Hidden files are skipped."""
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error_reason(error)}") from error
    if not found:
        raise UserError(f"{folder}: has no sub-folders; expected one per class with its images")
    if _SPLIT_FOLDERS.issuperset(found):
        raise UserError(
            f"{folder}: contains the splits {', '.join(found)}, not classes; pass one, such as {folder}/{found[0]}"
        )
    known = tuple(found) if classes is None else tuple(classes)
    if unknown := sorted(set(found) - set(known)):
        raise UserError(f"{folder}/{unknown[0]}: not a known class: {nearest(unknown[0], known)}")
    label = {name: number for number, name in enumerate(known)}
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listed = pool.map(lambda name: _list_class(str(folder), name, label[name]), found)
        images = [image for images in listed for image in images]
    if not images:
        raise UserError(f"{folder}: its {len(found)} class folders contain no files")
    return _collect(images, known)


def read_csv(file: Path, classes: Sequence[str] | None = None) -> SourceImages:
    """Read a list: a header with `path` and `label`, then a line per image; paths are relative to the file's folder.

    Labels are numbers or names. Names are sorted unless `classes` defines their order.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            if missing := {"path", "label"} - set(reader.fieldnames or ()):
                raise UserError(
                    f"{file}: line 1 must be a header with the columns path,label ({min(missing)} is missing)"
                )
            rows = [(f"{file}: line {reader.line_num}", row["path"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read: {error_reason(error)}") from error
    if not rows:
        raise UserError(f"{file}: lists no images")
    for where, path, text in rows:
        if not path or not text:
            raise UserError(f"{where} needs a path and a label")
    if classes is None and not all(re.fullmatch("[0-9]+", text) for _, _, text in rows):
        classes = sorted({text for _, _, text in rows})

    def find_image(row: tuple[str, str, str]) -> _Found:
        where, path, text = row
        location = os.path.join(file.parent, path)  # noqa: PTH118, a million Paths would be slow
        try:
            size = os.stat(location).st_size  # noqa: PTH116
        except OSError as error:
            raise UserError(f"{where}: {path}: {error_reason(error)}") from error
        return _Found(path, location, 0, size, find_label(where, text, classes))

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        images = list(pool.map(find_image, rows))
    if classes is None:
        classes = [str(number) for number in range(max(image.label for image in images) + 1)]
    return _collect(images, classes)


def read_devkit(devkit: Path) -> tuple[tuple[str, ...], list[int]]:
    """Return the 1,000 synsets of ILSVRC2012 sorted by name, and the labels of validation images 1, 2, ..."""
    from scipy.io import loadmat

    try:
        with tarfile.open(devkit) as tar:
            names = {Path(name).name: name for name in tar.getnames()}
            meta, truth = (
                tar.extractfile(names[name]).read()  # type: ignore[union-attr]
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
        classes = sorted(leaves.values())
        label = {name: number for number, name in enumerate(classes)}
        return tuple(classes), [label[leaves[int(line)]] for line in truth.split()]
    except Exception as error:  # tarfile, gzip and scipy document no common error class
        raise UserError(f"{devkit}: not the ILSVRC2012 devkit: {error_reason(error)}") from error


def _read_ilsvrc(archive: Path, split: str, classes: Sequence[str] | None, devkit: Path) -> SourceImages:
    """List the images in the tars, or in the tars inside the tar: none is compressed, so they can be read in place."""
    known, truth = read_devkit(devkit) if devkit.exists() else (None, [])
    if classes is not None and known is not None and tuple(classes) != known:
        raise UserError(f"{devkit}: its {len(known)} synsets differ from the given classes or their order")
    known = tuple(classes) if classes is not None else known
    members = _list_tar(archive, 0)
    if split == "val":
        if not truth:
            raise UserError(f"{devkit}: file not found; it has the labels of {archive.name}: pass --devkit FILE")
        if len(truth) != len(members):
            raise UserError(f"{archive}: {len(members):,} images, but {devkit.name} has labels for {len(truth):,}")
        members = sorted(members, key=lambda member: member.name)
        images = [
            _Found(member.name, str(archive), member.offset_data, member.size, label)
            for member, label in zip(members, truth, strict=True)
        ]
        assert known is not None
        return _collect(images, known)

    for member in members:
        if not re.fullmatch(r"n\d{8}\.tar", member.name):
            raise UserError(f"{archive}: {member.name} is not a synset's tar, such as n01440764.tar")
    members = sorted(members, key=lambda member: member.name)
    synsets = [member.name.removesuffix(".tar") for member in members]
    known = known or tuple(synsets)
    if unknown := sorted(set(synsets) - set(known)):
        raise UserError(
            f"{archive}: {unknown[0]} is not one of the {len(known):,} classes: {nearest(unknown[0], known)}"
        )
    label = {name: number for number, name in enumerate(known)}

    def list_synset(member: tarfile.TarInfo) -> list[_Found]:
        synset = member.name.removesuffix(".tar")
        inner = _list_tar(archive, member.offset_data, f"{archive}: {member.name}")
        return [
            _Found(f"{synset}/{image.name}", str(archive), image.offset_data, image.size, label[synset])
            for image in inner
        ]

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        images = [image for images in pool.map(list_synset, members) for image in images]
    if not images:
        raise UserError(f"{archive}: contains no images")
    return _collect(images, known)


def _list_class(folder: str, name: str, label: int) -> list[_Found]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed: {error_reason(error)}") from error

    found = []
    for parent, folders, files in os.walk(f"{folder}/{name}", onerror=fail, followlinks=True):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        for file in sorted(entry for entry in files if not entry.startswith(".")):
            path = f"{parent}/{file}"
            found.append(_Found(path[len(folder) + 1 :], path, 0, _size(path), label))
    return found


def _size(path: str) -> int:
    """Return a file's size, or 0 if it cannot be read, such as a broken link, which reading it will report."""
    try:
        return os.stat(path).st_size  # noqa: PTH116, a million Paths would be slow
    except OSError:
        return 0


def _list_tar(archive: Path, start: int, where: str = "") -> list[tarfile.TarInfo]:
    """List the files of the tar that starts at byte `start` of `archive`, with offsets from byte 0."""
    where = where or str(archive)
    try:
        with archive.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = [member for member in tar if member.isfile()]
                file.seek(tar.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{where}: cannot be read: {error_reason(error)}") from error
    if not complete:
        raise UserError(f"{where}: truncated or damaged; download it again")
    return members


def _collect(images: list[_Found], classes: Sequence[str]) -> SourceImages:
    names, paths, offset, size, label = zip(*images, strict=True)
    return SourceImages(
        list(names),
        list(paths),
        np.array(offset, np.int64),
        np.array(size, np.int64),
        np.array(label, np.int32),
        tuple(classes),
    )
