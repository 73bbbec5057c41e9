"""The index of a data set as a Parquet file, read from a path or a URL."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from distrain.config import DownloadConfig
from distrain.data.index import COLUMNS, Index, Shard, is_remote, pad_labels
from distrain.data.storage.client import explain
from distrain.data.storage.download import Downloader
from distrain.data.storage.retry import TOOL_POLICY, TOOL_TIMEOUT, RetryPolicy
from distrain.errors import UserError
from distrain.files import write_atomically
from distrain.masking import mask_urls

_FORMAT = 1


def load_index(path: str, download: DownloadConfig | None = None) -> Index:
    """Read an index file from a path or a URL, the latter with the retries and timeout of `download`, else of a tool.

    Raises UserError when it is missing or not an index, TemporaryError when it cannot be read at present.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # Not BytesIO: reading a Python file leaves a thread behind that can abort the process at exit. Not read_table,
        # which imports pandas.
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(_read_bytes(path, download))).read()
        header = json.loads(table.schema.metadata[b"distrain"])
        columns = {
            name: _numbers(table[name].combine_chunks()).astype(kind)
            for name, kind in COLUMNS.items()
            if name != "label"
        }
        column = table["label"].combine_chunks()
        is_list = pyarrow.types.is_list(column.type)
        labels = _numbers(column.flatten() if is_list else column).astype(COLUMNS["label"])
    except (pyarrow.ArrowException, BufferError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index written by `python -m distrain shards`") from error
    if header["format"] != _FORMAT:
        raise UserError(
            f"{path}: index format {header['format']} is not supported (expected {_FORMAT}); index the shards again"
        )
    if not len(table):
        raise UserError(f"{path}: the index has no samples")
    counts = _numbers(column.value_lengths()).astype(np.int64) if is_list else np.ones(len(table), np.int64)
    outside = np.flatnonzero((labels < 0) | (labels >= len(header["classes"])))
    if len(outside):
        sample = int(np.searchsorted(np.cumsum(counts), outside[0], side="right"))
        raise UserError(
            f"{path}: sample {sample} has label {labels[outside[0]]}, outside "
            f"0..{len(header['classes']) - 1}: index the shards again"
        )
    label = pad_labels(labels, counts) if is_list else labels
    shards = tuple(Shard(*shard) for shard in header["shards"])
    return Index(path.rpartition("/")[0] or ".", shards, tuple(header["classes"]), label=label, **columns)


def _numbers(column: Any) -> np.ndarray:
    """The numbers of an array of pyarrow, whose own conversion imports pandas."""
    return np.from_dlpack(column)


def save_index(index: Index, path: str | Path) -> None:
    """Write the index file atomically, readable by its owner only if it `has_secrets`. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    header = {"format": _FORMAT, "shards": index.shards, "classes": index.classes}
    columns = {name: getattr(index, name) for name in COLUMNS}
    if index.multi_label:
        starts = np.cumsum([0, *(index.label >= 0).sum(axis=1)], dtype=np.int32)
        columns["label"] = pyarrow.ListArray.from_arrays(starts, index.label[index.label >= 0])
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({"distrain": json.dumps(header)})
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, content)
    write_atomically(Path(path), content.getvalue().to_pybytes(), private=has_secrets(index))


def has_secrets(index: Index) -> bool:
    """Whether the URL of a shard contains a password or token, without which the shard could not be read."""
    return any(mask_urls(shard.name) != shard.name for shard in index.shards)


def _read_bytes(path: str, download: DownloadConfig | None) -> bytes:
    missing = "index not found; create it with `python -m distrain shards` or correct data.train and data.val"
    try:
        if is_remote(path):
            policy, timeout = TOOL_POLICY, TOOL_TIMEOUT
            if download is not None:
                policy, timeout = RetryPolicy(download.retries, download.retry_wait), download.timeout
            return Downloader(policy, timeout, Event()).read(path, missing)
        return Path(path).read_bytes()
    except UserError as error:  # all ranks read the same index
        raise UserError(str(error)) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing}") from error
    except OSError as error:
        raise explain(f"{path}: the index cannot be read", error) from error
