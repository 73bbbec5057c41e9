"""Checkpoints that are whole or not there: written beside, checksummed, renamed; verified before use.

A run's folder holds checkpoints/step-00000500/ and the like. Each has the tensors of the training state by
name, written by torch.distributed.checkpoint, and manifest.json with the size and checksum of every file.
A folder without the final name is debris of a write that was cut short.
"""

import json
import logging
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distrain.errors import UserError
from distrain.parallel.group import Group, new_gloo_group

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})$")
_DRAFT = ".tmp"
_BAD = ".bad"
_CHUNK = 1 << 22


class DamagedCheckpointError(Exception):
    """A checkpoint that does not hold what its manifest says."""


@dataclass(frozen=True)
class Snapshot:
    """A training state. `tensors` are named per parameter, whatever the strategy and world size that saved
    them; `extra` is what JSON can hold."""

    step: int
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]


class Checkpointer:
    """Saves and restores the training state of one run. Every rank has one, and all call it alike."""

    def __init__(self, folder: Path, group: Group, keep: int) -> None:
        self._folder = folder
        self._group = group
        self._keep = keep
        self._writers = new_gloo_group()  # its own, as it talks beside the training
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staged: dict[str, torch.Tensor] = {}
        self._writing: Future[None] | None = None
        self._saved = -1
        if group.leads:
            folder.mkdir(parents=True, exist_ok=True)
            for debris in folder.glob(f"*{_DRAFT}"):
                shutil.rmtree(debris)
        group.barrier()

    def save(self, step: int, tensors: dict[str, torch.Tensor], extra: dict[str, Any]) -> None:
        """Copy the state and write it in the background. A step that is already saved is left alone."""
        if step == self._saved:
            return
        self.wait()
        for name, tensor in tensors.items():
            if name not in self._staged:
                self._staged[name] = torch.empty_like(tensor, device="cpu")
            self._staged[name].copy_(tensor)
        self._saved = step
        self._writing = self._thread.submit(self._write, Snapshot(step, dict(self._staged), extra))

    def wait(self) -> None:
        """Return when the last save is on disk. Raises what went wrong in it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Finish what is being written and release the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def restore(self) -> Snapshot | None:
        """The newest whole checkpoint, the same on every rank; damaged ones are set aside with their reason."""
        chosen = self._group.from_leader(self._newest_whole() if self._group.leads else None)
        if chosen is None:
            return None
        snapshot = read(chosen)
        self._saved = snapshot.step
        return snapshot

    def _newest_whole(self) -> Path | None:
        for path in reversed(committed(self._folder)):
            try:
                verify(path)
                return path
            except DamagedCheckpointError as error:
                aside = _free_name(path.with_name(path.name + _BAD))
                path.rename(aside)
                (aside / "reason.txt").write_text(f"{error}\n")
                log.error("checkpoint %s is damaged: %s; set aside as %s", path.name, error, aside.name)
        return None

    def _write(self, snapshot: Snapshot) -> None:
        final = self._folder / f"step-{snapshot.step:08d}"
        draft = final.with_name(final.name + _DRAFT)
        # CheckpointException is a BaseException and would end the thread without a word.
        try:
            save(snapshot.tensors, checkpoint_id=draft, process_group=self._writers)
        except CheckpointException as error:
            raise OSError(f"checkpoint of step {snapshot.step} failed: {error}") from error
        if self._group.leads:
            commit(draft, final, snapshot)
            for old in committed(self._folder)[: -self._keep]:
                remove(old)


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name))


def commit(draft: Path, final: Path, snapshot: Snapshot) -> None:
    """Describe what was written in a manifest, and give it its name once all of it is on disk."""
    files = {path.name: describe(path) for path in sorted(draft.iterdir())}
    manifest = draft / MANIFEST
    with manifest.open("w") as file:
        json.dump({"step": snapshot.step, "files": files, **snapshot.extra}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(draft)
    draft.rename(final)
    _sync_folder(final.parent)


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after comparing every file with it. Raises DamagedCheckpointError naming the file that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} cannot be read: {error}") from error
    for name, expected in files.items():
        try:
            found = describe(path / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{name}: {error.strerror}") from error
        if found != expected:
            raise DamagedCheckpointError(f"{name} has {found}, the manifest says {expected}")
    assert isinstance(manifest, dict)
    return manifest


def read(path: Path) -> Snapshot:
    """Load a verified checkpoint. Every process that calls this reads all of it."""
    manifest = json.loads((path / MANIFEST).read_text())
    reader = FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that each process loads for itself, which is what we ask for
        load(tensors, storage_reader=reader, no_dist=True)
    extra = {key: value for key, value in manifest.items() if key not in ("step", "files")}
    return Snapshot(manifest["step"], tensors, extra)


def describe(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    for chunk in _chunks(path):
        checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"size": size, "crc32": checksum}


def remove(path: Path) -> None:
    """Delete a checkpoint; cut short, it leaves debris and never a checkpoint with missing files."""
    doomed = path.with_name(path.name + _DRAFT)
    path.rename(doomed)
    shutil.rmtree(doomed)


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the weights, their average and the buffers of a state, by name: equal for equal bits."""
    hasher = sha256()
    for name in sorted(name for name in tensors if name.startswith(("model/", "average/"))):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy().tobytes())
    return f"sha256:{hasher.hexdigest()[:32]}"


def check_identity(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on with a run under other settings. Raises UserError naming the key and both values."""
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if before != now:
            raise UserError(
                f"{key} was {before!r} when this run began and is {now!r} now: "
                f"set it back, or start a new run with another run.name"
            )


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
