"""A folder with a sub-folder of images per class as a source of shards.

Whatever else such a folder may contain, splits, a folder around all others, what operating systems leave behind, links
in a circle, is recognized and reported, because images would get wrong labels or be lost.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distrain.data.shards.interrupts import Poll, map_threads
from distrain.data.shards.labels import name_from_folder, refuse_case_variants
from distrain.data.shards.members import IMAGE_SUFFIXES, SYSTEM_FOLDERS
from distrain.data.shards.source_images import LISTING_THREADS, FoundImage, Info, SourceImages, collect, find_same_files
from distrain.data.storage.client import explain
from distrain.errors import UserError, nearest

_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|eval)[-_ ]?(set|images|data|\d+)?", re.IGNORECASE
)
_INSIST = "pass --folders-are-classes"


@dataclass
class _Listing:
    """What one class folder holds."""

    images: list[FoundImage] = field(default_factory=list)
    folders: dict[tuple[int, int], str] = field(default_factory=dict)  # by device and inode
    skipped: list[str] = field(default_factory=list)
    has_folders: bool = False


def read_folder(
    folder: Path, classes: Sequence[str] | None, insist: bool, info: Info = lambda line: None
) -> SourceImages:
    """List a folder with a sub-folder per class, named after it; images anywhere below.

    Hidden files and folders of the operating system are skipped; `info` gets a line about these and about classes
    without images. With `insist` every folder is a class, even if it looks like a split or a folder around the
    classes. Raises UserError.
    """
    entries, beside, hidden = _list_top(folder)
    names = {name_from_folder(str(folder), entry): entry for entry in entries}
    if len(names) < len(entries):
        twice = next(entry for entry in entries if names[name_from_folder(str(folder), entry)] != entry)
        raise UserError(
            f"{folder}: two folders are called {twice!r}, in different Unicode forms (NFC, NFD): merge them"
        )
    found = sorted(names)
    if not insist:
        _refuse_splits(folder, found, classes)
    known = tuple(found) if classes is None else tuple(classes)
    if unknown := sorted(set(found) - set(known)):
        raise UserError(f"{folder}/{names[unknown[0]]}: not a known class: {nearest(unknown[0], known)}")
    if classes is None and not insist:
        refuse_case_variants(found, f"merge the folders in {folder}, or {_INSIST} if they are two classes")
    label = {name: number for number, name in enumerate(known)}

    def list_one(name: str, poll: Poll) -> _Listing:
        return _list_class(str(folder), names[name], label[name], insist, poll)

    listed = dict(zip(found, map_threads(list_one, found, LISTING_THREADS), strict=True))
    images = [image for listing in listed.values() for image in listing.images]
    if not images:
        raise UserError(f"{folder}: its {len(found)} class folders contain no files")
    if not insist and classes is None:
        _refuse_wrapper(folder, listed)
    _refuse_shared(listed)
    _report_same_files(folder, images, info)
    _report_skipped(folder, beside, [*hidden, *(name for listing in listed.values() for name in listing.skipped)], info)
    return collect(images, known)


def _list_top(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the folders that may be classes, all else that is not hidden, and what is hidden."""
    try:
        entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder))
    except OSError as error:
        raise explain(f"{folder}: cannot be listed", error) from error
    hidden = [name for name, _ in entries if _is_hidden(name)]
    found = [name for name, is_folder in entries if is_folder and not _is_hidden(name)]
    if not found:
        raise UserError(f"{folder}: has no sub-folders; expected one per class with its images")
    return found, [name for name, is_folder in entries if not is_folder and not _is_hidden(name)], hidden


def _refuse_splits(folder: Path, found: list[str], classes: Sequence[str] | None) -> None:
    splits = [name for name in found if _SPLIT.fullmatch(name) and name not in (classes or ())]
    if splits:
        of_all = "not classes" if len(splits) == len(found) else "among the classes"
        raise UserError(
            f"{folder}: contains the splits {', '.join(splits)}, {of_all}; pass one, such as {folder}/{splits[0]}, "
            f"or {_INSIST} if they are classes"
        )


def _refuse_wrapper(folder: Path, listed: dict[str, _Listing]) -> None:
    """Raises UserError if there is a single class whose images are all in sub-folders, which may be the classes."""
    if len(listed) == 1:
        (name,) = listed
        if listed[name].has_folders and all(image.name.count("/") > 1 for image in listed[name].images):
            raise UserError(
                f"{folder}: its only folder, {name}, has only folders; pass {folder}/{name} if those are the classes, "
                f"or {_INSIST} if it is one class"
            )


def _list_class(folder: str, entry: str, label: int, insist: bool, poll: Poll) -> _Listing:
    found = _Listing()

    def fail(error: OSError) -> None:
        raise explain(f"{error.filename}: cannot be listed", error) from error

    for parent, folders, files in os.walk(f"{folder}/{entry}", onerror=fail, followlinks=True):
        poll()
        _remember(found, parent)
        for name in folders:
            if not insist and _SPLIT.fullmatch(name):
                raise UserError(
                    f"{parent}/{name}: looks like a split inside a class; build each split on its own, or {_INSIST}"
                )
        hidden = [name for name in (*folders, *files) if _is_hidden(name)]
        found.skipped += [f"{parent}/{name}"[len(folder) + 1 :] for name in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        found.has_folders |= bool(folders)
        for file in sorted(set(files) - set(hidden)):
            path = f"{parent}/{file}"
            found.images.append(_stat(path[len(folder) + 1 :], path, label))
    return found


def _remember(found: _Listing, parent: str) -> None:
    """Raises UserError for a folder that was listed before, through a link."""
    status = os.stat(parent)  # noqa: PTH116, a million Paths would be slow
    other = found.folders.setdefault((status.st_dev, status.st_ino), parent)
    if other != parent:
        raise UserError(f"{parent}: is a link to {other}, whose images would be listed twice; remove it")


def _stat(name: str, path: str, label: int) -> FoundImage:
    """Return a file, with size 0 if it cannot be read, such as a broken link, which reading it will report."""
    try:
        status = os.stat(path)  # noqa: PTH116, a million Paths would be slow
    except OSError:
        return FoundImage(name, path, 0, 0, label)
    size = status.st_size if stat.S_ISREG(status.st_mode) else 0
    return FoundImage(name, path, 0, size, label, status.st_ctime_ns, status.st_dev, status.st_ino)


def _refuse_shared(listed: dict[str, _Listing]) -> None:
    """Raises UserError if a link puts a folder into two classes."""
    seen: dict[tuple[int, int], str] = {}
    for listing in listed.values():
        for identity, path in listing.folders.items():
            other = seen.setdefault(identity, path)
            if other != path:
                raise UserError(f"{path}: is the same folder as {other}, in another class, by a link; remove one")


def _report_same_files(folder: Path, images: list[FoundImage], info: Info) -> None:
    pairs = [(images[first], images[other]) for first, other in find_same_files(images)]
    if pairs:
        apart = sum(one.label != other.label for one, other in pairs)
        one, other = next((pair for pair in pairs if pair[0].label != pair[1].label), pairs[0])
        info(
            f"{folder}: {len(pairs):,} files are links to others, {apart:,} of them in another class, such as "
            f"{one.name} and {other.name}"
        )


def _report_skipped(folder: Path, beside: list[str], hidden: list[str], info: Info) -> None:
    if beside:
        images = sum(name.lower().endswith(IMAGE_SUFFIXES) for name in beside)
        info(
            f"{folder}: {len(beside):,} files in no class folder were skipped, {images:,} of them images, "
            f"the first: {beside[0]}"
        )
    if hidden:
        info(f"{folder}: {len(hidden):,} hidden or system files and folders were skipped, the first: {hidden[0]}")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS
