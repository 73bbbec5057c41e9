"""Checkpoints as files: committed atomically, checksummed, verified before use.

A run's folder holds checkpoints/step-00000500/ and so on. Each has the tensors of the training state by name, written
by torch.distributed.checkpoint, and manifest.json with the size and checksum of every file. A folder named .tmp is
left over from an interrupted write.
"""

import errno
import os
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
from distrain.files import open_regular, parse_json, read_json, read_regular, sync_folder, write_json

MANIFEST = "manifest.json"
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
    return sorted(path for path in _entries(folder) if _NAME.match(path.name))


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
    write_json(tmp / MANIFEST, content)
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
    with suppress(NotADirectoryError):  # a file in place of the checkpoint
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
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def set_aside_names(folder: Path) -> list[str]:
    """The checkpoints that were set aside as damaged."""
    return sorted(path.name for path in _entries(folder) if path.name.startswith("step-") and _BAD in path.name)


def clear_tmp(folder: Path) -> None:
    """Remove what interrupted writes have left.

    Renamed first, as an attempt that is taken for lost may be about to commit it.
    """
    for path in _entries(folder):
        if path.name.startswith("step-") and path.name.endswith(_TMP):
            remove(path)


def choose_kept(steps: Set[int], newest: int, every: int, best: int | None) -> set[int]:
    """The steps to keep: the `newest` ones, multiples of `every` (0: none), the `best`."""
    latest = sorted(steps)[-newest:]
    return {step for step in steps if step in latest or step == best or (every and step % every == 0)}


def read_best(folder: Path) -> tuple[int, float] | None:
    """Step and validation accuracy or mAP in [0, 1] of the best checkpoint, if any."""
    cure = "delete it; the next validation that is best so far writes it"
    best = read_json(folder / _BEST, cure, {"step": int, "top1": float})
    return (best["step"], best["top1"]) if best else None


def write_best(folder: Path, step: int, score: float) -> None:
    """Record which checkpoint is the best."""
    write_json(folder / _BEST, {"step": step, "top1": score})


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
        manifest, is_intact = parse_json(read_regular(path / MANIFEST))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise unreadable(path / MANIFEST, error) from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{MANIFEST} is {error}") from error
    if is_intact is None:
        is_intact = "format" not in manifest  # state format 1 has no checksum; check_identity refuses it by name
    if not is_intact or not _is_manifest(manifest) or manifest["step"] != step_of(path):
        raise DamagedCheckpointError(f"{MANIFEST} is not as it was written")
    return manifest


def _is_manifest(content: dict[str, Any]) -> bool:
    """Whether a JSON object has what a checkpoint's manifest has to have."""
    files = content.get("files")
    absent: Any = None if "format" in content else {}  # state format 1 has no versions
    return (
        isinstance(content.get("step"), int)
        and all(isinstance(content.get(name, absent), dict) for name in ("identity", "versions"))
        and isinstance(files, dict)
        and all(Path(name).name == name and _is_checksum(value) for name, value in files.items())
    )


def _is_checksum(value: Any) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is int for name in ("size", "crc32"))


def unreadable(path: Path, error: OSError) -> DamagedCheckpointError | TemporaryError:
    """What an error while a checkpoint is read means: damage if something else is in place of a file or folder."""
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENXIO):
        return DamagedCheckpointError(f"{path.name}: {error.strerror}")
    return TemporaryError(f"{path}: cannot be read: {error.strerror}; check the file system and run again", scope="all")


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, nothing if it does not exist. Raises OSError, which Path.glob ignores."""
    try:
        return [folder / name for name in os.listdir(folder)]  # noqa: PTH208
    except FileNotFoundError:
        return []


def _chunks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists() or candidate.is_symlink():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
