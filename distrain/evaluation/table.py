"""The table of predictions: a row per sample, from which every metric is computed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError
from distrain.evaluation.predictions import TOP

_KEY = b"distrain"


@dataclass(frozen=True)
class Table:
    """n predictions over c scored classes."""

    classes: tuple[str, ...]
    """Names of the scored classes."""
    sample: NDArray[np.int64]
    shard: NDArray[Any]
    """Name of the shard that holds the sample [n]."""
    label: NDArray[np.int32]
    """[n], by position in `classes`."""
    accepted: list[list[int]] | None
    """All classes that count as right for each sample, if there are several."""
    probabilities: NDArray[np.float32]
    """[n, c]."""
    rank: NDArray[np.int32]
    """How many other classes do not score lower than the label [n]: 0 is a top-1 hit."""
    loss: NDArray[np.float32]
    """Cross-entropy [n]."""
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    """Of the stored image, pixels [n]."""
    training: NDArray[np.int64] | None = None
    """How many samples of each class the model was trained on [c]; None if it does not say."""

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The likeliest class of each sample, [n]; of those with equal probability the first."""
        return self.probabilities.argmax(axis=1)

    @property
    def top(self) -> NDArray[np.int64]:
        """The five likeliest classes of each sample, or all if there are fewer, in descending order."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")[:, :TOP]

    def hits(self, k: int) -> NDArray[np.bool_]:
        """Whether the label, or any accepted class, is among the k likeliest [n]. Ties and NaN count as misses."""
        if self.accepted is None:
            return self.rank < k
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return np.array([bool(set(row) & set(right)) for row, right in zip(best.tolist(), self.accepted, strict=True)])

    def rows(self, chosen: NDArray[np.bool_]) -> "Table":
        """The table of the rows where `chosen`, bool [n], is true."""
        columns = ("sample", "shard", "label", "probabilities", "rank", "loss", "width", "height")
        accepted = None if self.accepted is None else [self.accepted[row] for row in np.flatnonzero(chosen)]
        return replace(self, accepted=accepted, **{name: getattr(self, name)[chosen] for name in columns})


def write_table(table: Table, path: Path, about: dict[str, Any]) -> None:
    """Write predictions.parquet; `about` says of which model and data. Raises OSError."""
    import pyarrow

    columns = {
        "sample": table.sample,
        "shard": pyarrow.array(table.shard).dictionary_encode(),
        "label": table.label,
        "top5": list(table.top.astype(np.int32)),
        "probabilities": list(table.probabilities),
        "rank": table.rank,
        "loss": table.loss,
        "width": table.width,
        "height": table.height,
    }
    if table.accepted is not None:
        columns["accepted"] = pyarrow.array(table.accepted, pyarrow.list_(pyarrow.int32()))
    write_columns(columns, path, {"classes": table.classes, **about})


def write_columns(columns: dict[str, Any], path: Path, header: dict[str, Any]) -> None:
    """Write columns and what they are of. Raises OSError."""
    import pyarrow
    import pyarrow.parquet

    content = pyarrow.table(columns).replace_schema_metadata({_KEY: json.dumps(header)})
    pyarrow.parquet.write_table(content, path)


def read_table(path: Path) -> Table:
    """Read what `write_table` wrote. Raises UserError if it is anything else."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(path.read_bytes())).read()
        header = json.loads(table.schema.metadata[_KEY])
        plain = {name: table[name].to_numpy() for name in ("sample", "label", "rank", "loss", "width", "height")}
        return Table(
            tuple(header["classes"]),
            shard=np.array(table["shard"].to_pylist()),
            accepted=table["accepted"].to_pylist() if "accepted" in table.column_names else None,
            probabilities=np.array(table["probabilities"].to_pylist(), np.float32),
            **plain,
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a table of `distrain evaluate`") from error
