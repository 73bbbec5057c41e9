"""Which images a process is decoding: decoders are written in C, and an image that crashes one ends the process.

A memory-mapped file on the node's own disk holds the images in flight; it outlives the process, and costs no system
call per image. If the process ended by the signal of a crash, the next start on this node tries them one by one (see
vetting.py).
"""

import faulthandler
import hashlib
import logging
import mmap
import os
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from distrain.config import Config
from distrain.data.storage.locks import try_lock
from distrain.data.storage.private import create_tmp_folder
from distrain.errors import UserError
from distrain.files import resolve

_log = logging.getLogger(__name__)

_SLOTS = 4096  # images in flight that are recorded, more than any loader has
_crash_logs: dict[Path, IO[bytes]] = {}  # by folder: Python's fault handler writes to one file of this process


class Crop(NamedTuple):
    """What is decoded of an image: a crop box, pixels, and the side of the result."""

    sample: int
    top: int
    left: int
    height: int
    width: int
    size: int


class InFlight:
    """The images that this process is decoding for one split of a run."""

    def __init__(self, folder: Path, split: str) -> None:
        """`folder` is private to this user and on the node's own disk. Raises OSError."""
        self._log = _open_crash_log(folder)
        self._path = self._log.with_suffix(f".{split}")
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try_lock(self._file)  # released when the process ends for any reason
        os.ftruncate(self._file, _SLOTS * len(Crop._fields) * 8)
        self._memory = mmap.mmap(self._file, 0)
        self._slots = np.frombuffer(self._memory, np.int64).reshape(_SLOTS, len(Crop._fields))
        self._slots[:, 0] = -1
        self._free = deque(range(_SLOTS))  # its methods are atomic

    @contextmanager
    def decoding(self, crops: Sequence[Crop]) -> Iterator[None]:
        """Record images for as long as they are decoded."""
        taken = []
        with suppress(IndexError):  # all slots are taken: the rest is not recorded
            for crop in crops:
                slot = self._free.pop()
                self._slots[slot, 1:] = crop[1:]
                self._slots[slot, 0] = crop[0]  # last, as it marks the slot as taken
                taken.append(slot)
        try:
            yield
        finally:
            for slot in taken:
                self._slots[slot, 0] = -1
            self._free.extend(taken)

    def close(self) -> None:
        """Remove the record: this process has not crashed."""
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        if not _records_beside(self._log):
            faulthandler.disable()
            _crash_logs.pop(self._log.parent).close()
            self._log.unlink(missing_ok=True)


def take_leftovers(folder: Path, split: str) -> list[Crop]:
    """What processes on this node that have crashed were decoding for a split; what others left is removed.

    Every record is taken by one caller only. Raises OSError.
    """
    found: set[Crop] = set()
    for path in sorted(folder.glob(f"*.{split}")):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            if not try_lock(file):
                continue  # its process is alive
            crash = path.with_suffix(".crash")
            if crash.exists() and crash.stat().st_size:
                slots = np.frombuffer(path.read_bytes(), np.int64).reshape(-1, len(Crop._fields))
                found |= {Crop(*map(int, slot)) for slot in slots if slot[0] >= 0}
            path.unlink(missing_ok=True)
            if not _records_beside(crash):
                crash.unlink(missing_ok=True)
        finally:
            os.close(file)
    return sorted(found)


def open_in_flight(config: Config, split: str) -> InFlight | None:
    """Record what this process decodes for a split; None, with a warning, if that is not possible on this host."""
    try:
        return InFlight(in_flight_folder(config.run.folder), split)
    except (OSError, UserError) as error:
        _log.warning("images that crash a decoder will not be found: %s", error)
        return None


def in_flight_folder(run_folder: Path) -> Path:
    """Where processes of a run on this node record what they decode. Raises UserError if the folder around it is not
    this user's alone, OSError."""
    return create_tmp_folder("decoding") / hashlib.sha256(os.fsencode(resolve(run_folder))).hexdigest()[:16]


def _open_crash_log(folder: Path) -> Path:
    """Have Python write to a file of this process when a signal of a crash ends it: how processes end is not known
    later otherwise. Returns its path."""
    if folder not in _crash_logs:
        folder.mkdir(parents=True, exist_ok=True)
        _crash_logs[folder] = (folder / f"{uuid.uuid4().hex}.crash").open("xb", buffering=0)
        faulthandler.enable(_crash_logs[folder])
    return Path(_crash_logs[folder].name)


def _records_beside(log: Path) -> list[Path]:
    """The records of the process that has this crash log."""
    return [path for path in log.parent.glob(f"{log.stem}.*") if path != log]
