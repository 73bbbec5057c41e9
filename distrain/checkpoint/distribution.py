"""One reader per node: its first rank reads and verifies a checkpoint in one pass and shares it with the others."""

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from distrain.checkpoint.files import Snapshot, checksum_file, read_manifest, unreadable
from distrain.checkpoint.metadata import METADATA, DamagedCheckpointError, Reader
from distrain.errors import TemporaryError
from distrain.parallel.group import Group
from distrain.parallel.shared_memory import new_memory_file, share_on_node

_ALIGNMENT = 64
_CHUNK = 1 << 22
_TAIL_BYTES = 8  # the length of the table of contents before them, at the end of the memory


def load_on_nodes(group: Group, path: Path) -> Snapshot:
    """Load a checkpoint, the same on every rank, into memory that the ranks of a node share; they must not change it.

    Raises DamagedCheckpointError, on every rank, if the main rank finds it damaged, TemporaryError if any node cannot
    read it or reads other bytes than the main rank.
    """
    file, problem = -1, None
    if group.is_node_main:
        try:
            file = read_into_memory(path)
        except (DamagedCheckpointError, TemporaryError) as error:
            problem = isinstance(error, DamagedCheckpointError), str(error)
    problems = group.gather(problem)
    if any(problems) and file >= 0:
        os.close(file)
    if problems[0] is not None and problems[0][0]:
        raise DamagedCheckpointError(problems[0][1])
    for rank, found in enumerate(problems):
        if found is not None:
            is_damage, text = found
            host = group.peers[rank].host
            if is_damage:
                text = (
                    f"{path}: intact as rank 0 reads it, and damaged as rank {rank} on {host} does: {text}; check the "
                    "memory of that host and how it mounts the folder, and run again"
                )
            raise TemporaryError(text, scope="all")
    return _snapshot(share_on_node(group, file))


def read_into_memory(path: Path) -> int:
    """Read a checkpoint once, verify it, and return the descriptor of a file in memory with its content.

    Raises DamagedCheckpointError naming the file that differs, TemporaryError if one cannot be read just now.
    """
    manifest = read_manifest(path)
    name = METADATA
    try:
        for name, expected in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise DamagedCheckpointError(f"{name} has {size} bytes, the manifest says {expected['size']}")
        name = METADATA
        if METADATA in manifest["files"]:
            _require_equal(METADATA, checksum_file(path / METADATA), manifest["files"][METADATA])
        metadata = Reader(path).read_metadata()
        content = {key: value for key, value in manifest.items() if key not in ("step", "files")}
        layout, size = _layout(metadata)
        table = json.dumps({"step": manifest["step"], "extra": content, "tensors": layout}).encode()
        file = new_memory_file(size + len(table) + _TAIL_BYTES)
        try:
            memory = mmap.mmap(file, 0)
            memory[size:] = table + len(table).to_bytes(_TAIL_BYTES, "little")
            tensors = _snapshot(memory).tensors
            items = _items_by_file(metadata, tensors)
            if foreign := items.keys() - manifest["files"].keys():
                raise DamagedCheckpointError(f"{min(foreign)} is not in the manifest")
            for name, expected in manifest["files"].items():
                if name != METADATA:
                    _read_file(path / name, expected, items.get(name, []))
        except BaseException:
            os.close(file)
            raise
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{name} is missing") from error
    except OSError as error:
        raise unreadable(path / name, error) from error
    return file


def _layout(metadata: Metadata) -> tuple[dict[str, tuple[str, list[int], int]], int]:
    """Type, size and offset in memory of each tensor, and the size of all."""
    layout, end = {}, 0
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            layout[name] = (str(dtype).removeprefix("torch."), list(entry.size), end)
            end += -(-entry.size.numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return layout, end


def _snapshot(memory: mmap.mmap) -> Snapshot:
    """The checkpoint in memory that read_into_memory filled. Its tensors keep the memory alive."""
    end = len(memory) - _TAIL_BYTES
    table = json.loads(memory[end - int.from_bytes(memory[end:], "little") : end])
    tensors = {}
    for name, (dtype_name, size, offset) in table["tensors"].items():
        dtype, count = getattr(torch, dtype_name), torch.Size(size).numel()
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=offset) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).view(size)
    return Snapshot(table["step"], tensors, table["extra"])


def _items_by_file(metadata: Metadata, tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """By name of the file: (offset, length, the tensor to fill) of what it holds."""
    items: dict[str, list[Any]] = {}
    try:
        for name, target in tensors.items():
            for chunk in metadata.state_dict_metadata[name].chunks:  # type: ignore[union-attr]
                stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                view = target
                for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    view = view.narrow(dim, start, length)
                items.setdefault(stored.relative_path, []).append((stored.offset, stored.length, view))
    except (LookupError, ValueError, RuntimeError, IndexError) as error:
        raise DamagedCheckpointError(f"{METADATA} is not valid: {' '.join(str(error).split())}") from error
    return items


def _read_file(path: Path, expected: dict[str, int], items: list[Any]) -> None:
    """Read a file once: fill the tensors that it holds and compare its checksum."""
    checksum, position, problem = 0, 0, ""
    with path.open("rb") as file:
        for offset, length, target in sorted(items, key=lambda item: item[0]):
            for data in _chunks(file, offset - position):
                checksum = zlib.crc32(data, checksum)
            data = file.read(length)
            checksum, position = zlib.crc32(data, checksum), max(position, offset) + len(data)
            try:
                tensor = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
                if tensor.shape != target.shape or tensor.dtype != target.dtype:
                    raise ValueError(f"a tensor of {list(tensor.shape)}, not {list(target.shape)}")
                target.copy_(tensor)
            except Exception as error:
                problem = problem or f"{path.name} is not valid: {' '.join(str(error).split())}"
        for data in _chunks(file, None):
            checksum, position = zlib.crc32(data, checksum), position + len(data)
    _require_equal(path.name, {"size": position, "crc32": checksum}, expected)
    if problem:
        raise DamagedCheckpointError(problem)


def _chunks(file: BinaryIO, length: int | None) -> Iterator[bytes]:
    """The next `length` bytes of a file, or all that is left."""
    left = length if length is not None else 1 << 62
    while left > 0 and (data := file.read(min(left, _CHUNK))):
        left -= len(data)
        yield data


def _require_equal(name: str, found: dict[str, int], expected: dict[str, int]) -> None:
    if found != expected:
        raise DamagedCheckpointError(f"{name} has {found}, the manifest says {expected}")
