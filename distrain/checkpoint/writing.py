"""Writing a state: which rank writes which tensors follows from their names and sizes, so that nobody has to plan it.

The files are those of torch.distributed.checkpoint, whose own planning gathers a list of all tensors from every rank.
"""

import heapq
import os
import pickle
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from distrain.checkpoint.metadata import METADATA
from distrain.files import write_atomically

_WRITERS = 64  # at most: more files cost a file system more than they save


class WrittenFile(NamedTuple):
    """What a rank has written."""

    name: str
    size: int
    crc32: int
    items: dict[str, tuple[int, int]]
    """Offset and length of each tensor in it."""


def share_of(rank: int, world: int, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors that a rank writes: about as many bytes as every other writer. The writers are spread over all ranks,
    and so over all nodes."""
    writers = [number * world // min(world, _WRITERS) for number in range(min(world, _WRITERS))]
    if rank not in writers:
        return []
    loads = [(0, writer) for writer in writers]
    own = []
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        size, writer = heapq.heappop(loads)
        heapq.heappush(loads, (size + tensors[name].nbytes, writer))
        if writer == rank:
            own.append(name)
    return own


def write_share(folder: Path, rank: int, world: int, tensors: Mapping[str, torch.Tensor]) -> WrittenFile | None:
    """Write and flush the share of a rank; None if it has none. Its checksum is that of the bytes in memory."""
    names = share_of(rank, world, tensors)
    if not names:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"__{rank}_0.distcp"
    size, checksum, items = 0, 0, {}
    with path.open("wb") as file:
        for name in names:
            content = BytesIO()
            torch.save(tensors[name], content)
            data = content.getbuffer()
            file.write(data)
            items[name] = size, len(data)
            size, checksum = size + len(data), zlib.crc32(data, checksum)
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path.name, size, checksum, items)


def write_metadata(folder: Path, tensors: Mapping[str, torch.Tensor], files: list[WrittenFile]) -> WrittenFile:
    """Write and flush what torch.distributed.checkpoint needs to find the tensors in the files."""
    stored = {
        MetadataIndex(name, [0] * tensors[name].dim(), 0): _StorageInfo(file.name, offset, length)
        for file in files
        for name, (offset, length) in file.items.items()
    }
    described: dict[str, STORAGE_TYPES] = {}
    for name, tensor in tensors.items():
        whole = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
        described[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), [whole])
    planned = {name: (name,) for name in tensors}
    content = pickle.dumps(Metadata(described, planned, stored, StorageMeta(), CURRENT_DCP_VERSION))
    write_atomically(folder / METADATA, content)
    return WrittenFile(METADATA, len(content), zlib.crc32(content), {})
