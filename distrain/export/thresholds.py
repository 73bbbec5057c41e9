"""The probability from which on an image has a label, for classifiers of any number of labels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.class_numbers import read_class_numbers
from distrain.errors import UserError
from distrain.export.model import Model

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
    return read_class_numbers(path, classes, option="--thresholds", noun="threshold", highest=1.0)


def write_thresholds(path: Path, classes: Sequence[str], thresholds: NDArray[np.float64]) -> None:
    """Write what `read_thresholds` reads. Raises OSError."""
    path.write_text(json.dumps(dict(zip(classes, thresholds.tolist(), strict=True)), indent=1) + "\n")
