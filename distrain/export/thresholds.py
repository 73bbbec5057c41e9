"""The probability from which on an image has a label, for classifiers of any number of labels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError, nearest
from distrain.export.load import Model

DEFAULT = 0.5
HELP = 'a JSON file {"CLASS": THRESHOLD}, such as thresholds.json of evaluate (multi-label models)'


def choose_thresholds(path: Path | None, model: Model) -> NDArray[np.float64]:
    """The thresholds of a file, else those the model carries, else 0.5, float64 [classes].

    Raises UserError for a file that is not one of this model.
    """
    if path is not None:
        if not model.multi_label:
            raise UserError(f"--thresholds {path}: the model predicts one class per image: leave it out")
        return read_thresholds(path, model.classes)
    return np.array(model.thresholds or [DEFAULT] * len(model.classes))


def read_thresholds(path: Path, classes: Sequence[str]) -> NDArray[np.float64]:
    """Read {"CLASS": THRESHOLD}, float64 [classes]. Raises UserError unless it names every class."""
    where, cure = f"--thresholds {path}", 'write {"CLASS": THRESHOLD, ...}, as evaluate does'
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {cure}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object: {cure}")
    if unknown := sorted(content.keys() - set(classes)):
        raise UserError(f"{where}: {unknown[0]} is not a class of the model: {nearest(unknown[0], classes)}")
    for name in classes:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{where}: the threshold of {name} is {value!r}: it must be a number from 0 to 1")
    return np.array([content[name] for name in classes], np.float64)


def write_thresholds(path: Path, classes: Sequence[str], thresholds: NDArray[np.float64]) -> None:
    """Write what `read_thresholds` reads. Raises OSError."""
    path.write_text(json.dumps(dict(zip(classes, thresholds.tolist(), strict=True)), indent=1) + "\n")
