"""Checkpoints as files: committed atomically, checksummed, verified before use.

A run's folder holds checkpoints/step-00000500/ and so on. Each has the tensors of the training state by name, written
by torch.distributed.checkpoint, and manifest.json with the size and checksum of every file. A folder named .tmp is
left over from an interrupted write.
"""

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from distrain.checkpoint.metadata import METADATA, DamagedCheckpointError, Reader
from distrain.errors import TemporaryError
from distrain.files import read_json, sync_folder, write_json

MANIFEST = "manifest.json"
_CHECKSUM = "crc32"  # of the manifest itself
_BEST = "best.json"
_NAME = re.compile(r"step-(\d{8})$")
_TMP = ".tmp"
_BAD = ".bad"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Snapshot:
    """A training state. `tensors` are named per parameter, independent of the strategy and world size that saved
    them; `extra` holds JSON values: the state's format, the run's identity, versions."""

    step: int
    tensors: dict[str, torch.Tensor]
    extra: dict[str, Any]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, existing or not."""
    return folder / f"step-{step:08d}"


def tmp_checkpoint_path(final: Path, token: str) -> Path:
    """The folder in which the attempt with this token writes a checkpoint before it is committed."""
    return final.with_name(f"{final.name}.{token[:12]}{_TMP}")


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.match(path.name))


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    match = _NAME.match(path.name)
    assert match is not None
    return int(match[1])


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(map(step_of, committed(folder)), default=0)


def commit(
    tmp: Path,
    final: Path,
    snapshot: Snapshot,
    files: dict[str, dict[str, int]],
    before_commit: Callable[[], None] = lambda: None,
) -> None:
    """Write the manifest of `tmp`, flush everything to disk, and rename it to `final`.

    `files` are the sizes and checksums that the ranks report of what they wrote. It is not committed if
    `before_commit`, called just before the rename, raises. Raises OSError if the files are not exactly those that the
    checkpoint's metadata names, or not visible here as they were written.
    """
    for name, written in files.items():
        if not (tmp / name).is_file() or (tmp / name).stat().st_size != written["size"]:
            raise OSError(f"{tmp / name} is not visible on the main rank's host: run.dir must be shared by all nodes")
    try:
        expected = {entry.relative_path for entry in Reader(tmp).read_metadata().storage_data.values()}
    except DamagedCheckpointError as error:
        raise OSError(str(error)) from error
    if files.keys() != expected | {METADATA}:
        raise OSError(f"the ranks wrote {sorted(files)}, but the metadata names {sorted(expected)}")
    content = {"step": snapshot.step, "files": files, **snapshot.extra}
    write_json(tmp / MANIFEST, {**content, _CHECKSUM: _checksum_content(content)})
    before_commit()
    tmp.rename(final)
    sync_folder(final.parent)


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest after comparing every file with it.

    Raises DamagedCheckpointError naming the file that differs, TemporaryError if one cannot be read just now.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        try:
            found = checksum_file(path / name)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{name} is missing") from error
        except OSError as error:
            raise unreadable(path / name, error) from error
        if found != expected:
            raise DamagedCheckpointError(f"{name} has {found}, the manifest says {expected}")
    try:
        metadata = Reader(path).read_metadata()
    except OSError as error:
        raise unreadable(path / METADATA, error) from error
    if foreign := {entry.relative_path for entry in metadata.storage_data.values()} - manifest["files"].keys():
        raise DamagedCheckpointError(f"{min(foreign)} is not in the manifest")
    return manifest


def newest_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint with a readable one; its files are not verified.

    Raises TemporaryError if one cannot be read just now.
    """
    for path in reversed(committed(folder)):
        with suppress(DamagedCheckpointError):
            return read_manifest(path)
    return None


def set_aside(path: Path, reason: str) -> Path:
    """Rename a damaged checkpoint so that no run loads it, and write the reason into it. Returns its new path."""
    aside = _free_name(path.with_name(path.name + _BAD))
    path.rename(aside)
    (aside / "reason.txt").write_text(f"{reason}\n")
    return aside


def read(path: Path) -> Snapshot:
    """Load a verified checkpoint. Every process that calls this reads all of it into host memory.

    Raises TemporaryError if it cannot be read just now.
    """
    manifest = read_manifest(path)
    try:
        entries = tensors_in(path).items()
        tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about loading without a process group, which is intended
            load(tensors, storage_reader=Reader(path), no_dist=True)
    except OSError as error:
        raise unreadable(path, error) from error
    extra = {key: value for key, value in manifest.items() if key not in ("step", "files")}
    return Snapshot(manifest["step"], tensors, extra)


def tensors_in(path: Path) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every tensor in a checkpoint, by name."""
    entries = Reader(path).read_metadata().state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


def checksum_file(path: Path) -> dict[str, int]:
    """Size in bytes and CRC-32 of a file."""
    checksum, size = 0, 0
    for chunk in _chunks(path):
        checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"size": size, "crc32": checksum}


def checksum_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """CRC-32 of the memory of each tensor, by name. They must be on the CPU."""
    return {
        name: zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data)
        for name, tensor in sorted(tensors.items())
    }


def remove(path: Path) -> None:
    """Delete a checkpoint or what a write has left; interrupted, this leaves a .tmp folder, never a checkpoint with
    missing files."""
    doomed = tmp_checkpoint_path(path, "removed")
    path.rename(doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed)


def set_aside_names(folder: Path) -> list[str]:
    """The checkpoints that were set aside as damaged."""
    return sorted(path.name for path in folder.glob(f"step-*{_BAD}*"))


def clear_tmp(folder: Path) -> None:
    """Remove what interrupted writes have left.

    Renamed first, as an attempt that is taken for lost may be about to commit it.
    """
    for tmp in folder.glob(f"step-*{_TMP}"):
        remove(tmp)


def choose_kept(steps: Set[int], newest: int, every: int, best: int | None) -> set[int]:
    """The steps to keep: the `newest` ones, multiples of `every` (0: none), the `best`."""
    latest = sorted(steps)[-newest:]
    return {step for step in steps if step in latest or step == best or (every and step % every == 0)}


def read_best(folder: Path) -> tuple[int, float] | None:
    """Step and validation accuracy in [0, 1] of the best checkpoint, if any."""
    best = read_json(folder / _BEST, "delete it; the next validation that is best so far writes it")
    return (best["step"], best["top1"]) if best else None


def write_best(folder: Path, step: int, top1: float) -> None:
    """Record which checkpoint is the best."""
    write_json(folder / _BEST, {"step": step, "top1": top1})


def weights_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the weights, their EMA and the buffers of a state, by name: equal for equal bits."""
    hasher = sha256()
    for name in sorted(name for name in tensors if name.startswith(("model/", "ema/"))):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy().tobytes())
    return f"sha256:{hasher.hexdigest()[:32]}"


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedCheckpointError if the manifest is not as it was written, TemporaryError if it cannot be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checksum = manifest.pop(_CHECKSUM, None)
        is_intact = checksum == _checksum_content(manifest)
        if checksum is None and "format" not in manifest:
            is_intact = True  # state format 1 has no checksum; check_identity refuses it by name
        is_intact = is_intact and manifest["step"] == step_of(path)
        names = [*manifest["files"]]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise unreadable(path / MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{MANIFEST} is not readable: {error}") from error
    if not is_intact or any(Path(name).name != name for name in names):
        raise DamagedCheckpointError(f"{MANIFEST} is not as it was written")
    assert isinstance(manifest, dict)
    return manifest


def _checksum_content(content: dict[str, Any]) -> int:
    """CRC-32 of a manifest without its checksum."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def unreadable(path: Path, error: OSError) -> TemporaryError:
    return TemporaryError(f"{path}: cannot be read: {error.strerror}; check the file system and run again", scope="all")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
