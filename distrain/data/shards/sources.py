"""Find the images of a data set that shards are built from: a folder, a list, or the original tars of ImageNet."""

import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from distrain.data.shards.folders import read_folder
from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.shards.labels import Kind
from distrain.data.shards.lists import read_csv
from distrain.data.shards.source_images import LISTING_THREADS, FoundImage, Info, SourceImages, collect
from distrain.data.storage.client import error_reason, explain
from distrain.errors import UserError, nearest

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_CHUNK = 1 << 20


def find(
    source: Path,
    split: str,
    classes: Sequence[str] | None = None,
    devkit: Path | None = None,
    *,
    kind: Kind = "auto",
    insist: bool = False,
    multi_label: bool = False,
    info: Info = lambda line: None,
) -> SourceImages:
    """List the images of `source`, which is a folder, a list or a tar of ImageNet. Raises UserError.

    The order of `classes` defines the labels; without it classes are sorted by name. `kind` says what the labels of a
    list are; with `insist` every folder is a class; with `multi_label` an image of a list has any number of labels.
    `info` gets a line about everything that is skipped or doubtful.
    """
    if source.is_file() and source.suffix in (".csv", ".tsv"):
        return read_csv(source, classes, kind, info, multi_label)
    if multi_label:
        raise UserError(f"{source}: --multi-label needs a list of images and their labels, a .csv or .tsv file")
    if source.is_file() and source.suffix == ".tar":
        return _read_ilsvrc(source, split, classes, devkit or source.parent / DEVKIT)
    if not source.is_dir():
        problem = "neither a folder nor a .csv, .tsv or .tar file" if source.exists() else "file or folder not found"
        raise UserError(f"{source}: {problem}")
    archive = source / f"ILSVRC2012_img_{split}.tar"
    if archive.is_file():
        return _read_ilsvrc(archive, split, classes, devkit or source / DEVKIT)
    return read_folder(source, classes, insist, info)


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
    changed = archive.stat().st_ctime_ns
    if split == "val":
        if not truth:
            raise UserError(f"{devkit}: file not found; it has the labels of {archive.name}: pass --devkit FILE")
        if len(truth) != len(members):
            raise UserError(f"{archive}: {len(members):,} images, but {devkit.name} has labels for {len(truth):,}")
        members = sorted(members, key=lambda member: member.name)
        for number, member in enumerate(members, 1):
            if not member.name.endswith(f"val_{number:08d}.JPEG"):
                raise UserError(f"{archive}: {member.name} found where ILSVRC2012_val_{number:08d}.JPEG is expected")
        images = [
            FoundImage(member.name, str(archive), member.offset_data, member.size, label, changed)
            for member, label in zip(members, truth, strict=True)
        ]
        assert known is not None
        return collect(images, known)

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

    def list_synset(member: tarfile.TarInfo, poll: Poll) -> list[FoundImage]:
        synset = member.name.removesuffix(".tar")
        inner = _list_tar(archive, member.offset_data, member.offset_data + member.size, f"{archive}: {member.name}")
        return [
            FoundImage(f"{synset}/{image.name}", str(archive), image.offset_data, image.size, label[synset], changed)
            for image in inner
        ]

    images = [image for images in map_threads(list_synset, members, LISTING_THREADS) for image in images]
    if not images:
        raise UserError(f"{archive}: contains no images")
    return collect(images, known)


def _list_tar(archive: Path, start: int, end: float = float("inf"), where: str = "") -> list[tarfile.TarInfo]:
    """List the files of the tar in bytes `start` to `end` of `archive`, with offsets from byte 0."""
    where = where or str(archive)
    try:
        with archive.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = [member for member in tar if not member.isdir()]
                file.seek(tar.offset)
                complete = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            while complete and file.tell() < end and (piece := file.read(int(min(_CHUNK, end - file.tell())))):
                complete = not any(piece)
    except OSError as error:
        raise explain(f"{where}: cannot be read", error) from error
    except tarfile.TarError as error:
        raise UserError(f"{where}: cannot be read: {error_reason(error)}") from error
    if not complete:
        raise UserError(f"{where}: truncated or damaged; download it again")
    names = Counter(member.name for member in members)
    for member in members:
        if not member.isreg() or member.issparse() or names[member.name] > 1:
            problem = "there twice" if names[member.name] > 1 else "not a stored file"
            raise UserError(f"{where}: {member.name} is {problem}; download it again")
    return members
