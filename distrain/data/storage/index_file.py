"""The index of a data set as a Parquet file, read from a path or a URL."""

import json
from io import BytesIO
from pathlib import Path
from threading import Event

import numpy as np

from distrain.config import DownloadConfig
from distrain.data.index import COLUMNS, Index, Shard, is_remote
from distrain.data.storage.download import Downloader
from distrain.errors import UserError

_FORMAT = 1


def load_index(path: str, download: DownloadConfig | None = None) -> Index:
    """Read an index file from a path or URL; `download` tells how patient to be with a server.

    Raises UserError when it is missing or is no index, TransferError when the server fails at every attempt.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(BytesIO(_read_bytes(path, download or DownloadConfig())))
        header = json.loads(table.schema.metadata[b"distrain"])
        columns = {name: table[name].to_numpy().astype(kind) for name, kind in COLUMNS.items()}
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index that `python -m distrain shards` wrote") from error
    if header["format"] != _FORMAT:
        raise UserError(f"{path}: index format {header['format']} is not known here (format {_FORMAT} is)")
    if not len(table):
        raise UserError(f"{path}: the index holds no samples")
    outside = np.flatnonzero((columns["label"] < 0) | (columns["label"] >= len(header["classes"])))
    if len(outside):
        raise UserError(
            f"{path}: sample {outside[0]} has label {columns['label'][outside[0]]}, outside "
            f"0..{len(header['classes']) - 1}: index the shards again"
        )
    root = path.rpartition("/")[0] or "."
    return Index(root, tuple(Shard(*shard) for shard in header["shards"]), tuple(header["classes"]), **columns)


def save_index(index: Index, path: str | Path) -> None:
    """Write the index file, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    header = {"format": _FORMAT, "shards": index.shards, "classes": index.classes}
    table = pyarrow.table({name: getattr(index, name) for name in COLUMNS})
    table = table.replace_schema_metadata({"distrain": json.dumps(header)})
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(table, draft)
    draft.replace(path)


def _read_bytes(path: str, download: DownloadConfig) -> bytes:
    missing = "no such index; make it with `python -m distrain shards` or set data.train and data.val"
    try:
        if is_remote(path):
            return Downloader(download.retries, download.retry_wait, download.timeout, Event()).read(path, missing)
        return Path(path).read_bytes()
    except UserError as error:  # all ranks read the same index
        raise UserError(str(error)) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing}") from error
    except OSError as error:
        raise UserError(f"{path}: the index cannot be read: {error.strerror}") from error
