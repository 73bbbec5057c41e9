"""The loss of classification, and weights of its classes."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError, nearest

BALANCED = "balanced"


def class_weights(setting: str, classes: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """The weight of each class in the loss, float32 [classes], from `loss.class_weights`; None for equal weights.

    `balanced` weighs a class by samples / (classes x its samples), so that all have the same sum of weights; anything
    else is a JSON file with the weight of every class by name. `counts` are the samples of each class, int64 [classes].
    Raises UserError for a class without samples, or a file that does not name every class.
    """
    if not setting:
        return None
    if setting == BALANCED:
        if not counts.all():
            empty = classes[int(np.argmin(counts))]
            raise UserError(
                f"loss.class_weights=balanced: data.train has no sample of {empty}: remove it from the index"
            )
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)
    return _read_weights(Path(setting), classes)


def _read_weights(path: Path, classes: Sequence[str]) -> NDArray[np.float32]:
    where = f"loss.class_weights: {path}"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}; write balanced, or a JSON file") from error
    except ValueError as error:
        raise UserError(f'{where}: not valid JSON: write {{"CLASS": WEIGHT, ...}}') from error
    if not isinstance(content, dict):
        raise UserError(f'{where}: not a JSON object: write {{"CLASS": WEIGHT, ...}}')
    if missing := [name for name in classes if name not in content]:
        raise UserError(f"{where}: has no weight of {missing[0]}, and {len(missing) - 1} more: name every class")
    if unknown := sorted(content.keys() - set(classes)):
        raise UserError(f"{where}: {unknown[0]} is not a class of data.train: {nearest(unknown[0], classes)}")
    for name in classes:
        weight = content[name]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise UserError(f"{where}: the weight of {name} is {weight!r}: it must be a number of at least 0")
    return np.array([content[name] for name in classes], np.float32)
