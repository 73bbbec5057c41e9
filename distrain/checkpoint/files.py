"""Checkpoints as files: whole or not there, checksummed, verified before use.

A run's folder holds checkpoints/step-00000500/ and the like. Each has the tensors of the training state by name,
written by torch.distributed.checkpoint, and manifest.json with the size and checksum of every file. A folder without
the final name is debris of a write that was cut short.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

MANIFEST = "manifest.json"
_BEST = "best.json"
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


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def tmp_checkpoint_path(final: Path) -> Path:
    """Where a checkpoint is before it is whole."""
    return final.with_name(final.name + _DRAFT)


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    match = _NAME.match(path.name)
    assert match is not None
    return int(match[1])


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(map(step_of, committed(folder)), default=0)


def commit(draft: Path, final: Path, snapshot: Snapshot, before_commit: Callable[[], None] = lambda: None) -> None:
    """Describe what was written in a manifest, and give it its name once all of it is on disk."""
    files = {path.name: describe(path) for path in sorted(draft.iterdir())}
    manifest = draft / MANIFEST
    with manifest.open("w") as file:
        json.dump({"step": snapshot.step, "files": files, **snapshot.extra}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(draft)
    before_commit()
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


def set_aside(path: Path, reason: str) -> Path:
    """Take a damaged checkpoint out of the way, with the reason beside it. Returns where it is now."""
    aside = _free_name(path.with_name(path.name + _BAD))
    path.rename(aside)
    (aside / "reason.txt").write_text(f"{reason}\n")
    return aside


def read(path: Path) -> Snapshot:
    """Load a verified checkpoint. Every process that calls this reads all of it."""
    manifest = json.loads((path / MANIFEST).read_text())
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in tensors_in(path).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that each process loads for itself, which is what we ask for
        load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    extra = {key: value for key, value in manifest.items() if key not in ("step", "files")}
    return Snapshot(manifest["step"], tensors, extra)


def tensors_in(path: Path) -> dict[str, TensorStorageMetadata]:
    """Size and type of every tensor in a checkpoint, by name."""
    entries = FileSystemReader(path).read_metadata().state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def describe(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    for chunk in _chunks(path):
        checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"size": size, "crc32": checksum}


def remove(path: Path) -> None:
    """Delete a checkpoint; cut short, it leaves debris and never a checkpoint with missing files."""
    doomed = tmp_checkpoint_path(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def clear_debris(folder: Path) -> None:
    """Remove what writes that were cut short have left."""
    for debris in folder.glob(f"step-*{_DRAFT}"):
        shutil.rmtree(debris)


def choose_kept(steps: Set[int], newest: int, every: int, best: int | None) -> set[int]:
    """Which checkpoints of `steps` to keep: the `newest` ones, those of every `every`-th step (0: none), the best."""
    latest = sorted(steps)[-newest:]
    return {step for step in steps if step in latest or step == best or (every and step % every == 0)}


def read_best(folder: Path) -> tuple[int, float] | None:
    """Step and validation accuracy of the best checkpoint, if one was noted."""
    try:
        noted = json.loads((folder / _BEST).read_text())
    except FileNotFoundError:
        return None
    return noted["step"], noted["top1"]


def write_best(folder: Path, step: int, top1: float) -> None:
    """Note which checkpoint is the best."""
    draft = folder / (_BEST + _DRAFT)
    draft.write_text(json.dumps({"step": step, "top1": top1}) + "\n")
    draft.replace(folder / _BEST)


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the weights, their average and the buffers of a state, by name: equal for equal bits."""
    hasher = sha256()
    for name in sorted(name for name in tensors if name.startswith(("model/", "average/"))):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy().tobytes())
    return f"sha256:{hasher.hexdigest()[:32]}"


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
