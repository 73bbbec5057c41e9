"""A number for each class, in a JSON file that people write."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError, nearest
from distrain.files import read_json_from_user


def read_class_numbers(
    path: Path, classes: Sequence[str], *, option: str, noun: str, highest: float = math.inf
) -> NDArray[np.float64]:
    """Read {"CLASS": NUMBER, ...}, float64 [classes]. `option` and `noun` say in messages what the numbers are.

    Raises UserError unless the file has a finite number from 0 to `highest` for every class and names no other.
    """
    where, form = f"{option} {path}", f'{{"CLASS": {noun.upper()}, ...}}'
    content = read_json_from_user(path, where, form)
    if not isinstance(content, dict):
        raise UserError(f"{where}: not a JSON object: expected {form}")
    if unknown := sorted(content.keys() - set(classes)):
        raise UserError(f"{where}: {unknown[0]} is none of the classes: {nearest(unknown[0], classes)}")
    if missing := [name for name in classes if name not in content]:
        raise UserError(f"{where}: has no {noun} of {missing[0]}, and {len(missing) - 1} more: name every class")
    for name, value in content.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= highest or math.isinf(value):
            limits = "of at least 0" if math.isinf(highest) else f"from 0 to {highest:g}"
            raise UserError(f"{where}: the {noun} of {name} is {value!r}: it must be a number {limits}")
    return np.array([content[name] for name in classes], np.float64)
