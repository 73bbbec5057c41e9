"""The metadata of a checkpoint, read without executing it.

torch.distributed.checkpoint keeps it as a pickle, which can run any code when it is loaded. Here only the classes of
which metadata consists can be loaded, and what it says is checked before anything is allocated or opened.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from distrain.files import open_regular

METADATA = ".metadata"

_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_ADMITTED = {
    *(("torch", name) for name in (*_DTYPES, "Size")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta",
        )
    ),
}  # fmt: skip


class DamagedCheckpointError(Exception):
    """A checkpoint that is not as it was written."""


class Reader(FileSystemReader):
    """Reads a checkpoint, whose tensors torch loads with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamagedCheckpointError, or OSError if it cannot be read just now."""
        folder = Path(self.path)
        try:
            with open_regular(folder / METADATA) as file:
                metadata = _Unpickler(file).load()
            _check(metadata, folder)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{Path(str(error.filename)).name} is missing") from error
        except OSError:
            raise
        except Exception as error:  # pickle raises anything for damaged input
            raise DamagedCheckpointError(f"{METADATA} is not valid: {' '.join(str(error).split())}") from error
        metadata.storage_meta.load_id = self.load_id
        assert isinstance(metadata, Metadata)
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _check(metadata: Any, folder: Path) -> None:
    """Raises ValueError if the metadata does not fit the files beside it."""
    if not isinstance(metadata, Metadata) or metadata.storage_meta is None:
        raise ValueError("it is not the metadata of a checkpoint")
    sizes: dict[str, int] = {}
    for entry in metadata.storage_data.values():
        name = entry.relative_path
        if Path(name).name != name or (folder / name).is_symlink():
            raise ValueError(f"it names the file {name}")
        if name not in sizes:
            sizes[name] = os.stat(folder / name).st_size  # noqa: PTH116, for the name alone
        if entry.offset < 0 or entry.length < 0 or entry.offset + entry.length > sizes[name]:
            raise ValueError(f"it names bytes past the end of {name}")
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata) or not isinstance(tensor.properties.dtype, torch.dtype):
            raise ValueError(f"{name} is not a tensor")
        count = torch.Size(tensor.size).numel()
        if count * tensor.properties.dtype.itemsize > sum(sizes.values()):
            raise ValueError(f"{name} is larger than the files")
        if any(MetadataIndex(name, chunk.offsets) not in metadata.storage_data for chunk in tensor.chunks):
            raise ValueError(f"a part of {name} is in no file")
        if sum(torch.Size(chunk.sizes).numel() for chunk in tensor.chunks) != count:
            raise ValueError(f"the parts of {name} are not all of it")
