"""Match the classes of a data set with those of a classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.errors import UserError, nearest
from distrain.files import read_json_from_user


class Matching(NamedTuple):
    """How the classes of an index and of a classifier belong together."""

    labels: NDArray[np.int32]
    """The classifier's output for each class of the index."""
    outputs: NDArray[np.int32]
    """The classifier's outputs that are scored, in ascending order."""
    names: tuple[str, ...]
    """Of the outputs that are scored."""
    note: str = ""
    """What to tell the user."""


def match_classes(
    model: Sequence[str],
    data: Sequence[str],
    where: str,
    mask: bool,
    cure: str = "--classes FILE gives the model's classes other names",
) -> Matching:
    """Match classes by name. With `mask`, only the classes of the data are scored, as is usual for data sets with a
    part of ImageNet's classes.

    A classifier without names takes those of data with as many classes. Raises UserError, naming a class, if the data
    has one that the classifier has not, with the `cure`.
    """
    everything = np.arange(len(model), dtype=np.int32)
    numbered = [str(number) for number in range(len(model))]
    if list(model) == list(data):
        return Matching(everything, everything, tuple(model))
    if list(model) == numbered and len(data) == len(model):
        note = f"the model does not name its classes: they are taken for those of {where}"
        return Matching(everything, everything, tuple(data), note)
    output = {name: number for number, name in enumerate(model)}
    if unknown := [name for name in data if name not in output]:
        raise UserError(
            f"{where}: {len(unknown)} of its {len(data)} classes are not the model's, such as {unknown[0]}: "
            f"{nearest(unknown[0], model)}; {cure}"
        )
    labels = np.array([output[name] for name in data], np.int32)
    if len(data) == len(model):
        return Matching(labels, everything, tuple(model), "classes are matched by name: their order differs")
    if mask:
        outputs = np.sort(labels)
        names = tuple(model[number] for number in outputs.tolist())
        return Matching(labels, outputs, names, f"scored among the {len(data)} classes of {where}")
    note = f"scored among all {len(model)} classes of the model; --mask scores among the {len(data)} of {where}"
    return Matching(labels, everything, tuple(model), note)


def read_accepted(path: Path, samples: int, classes: int) -> list[list[int]]:
    """Read the accepted classes of each sample: a JSON list of lists of the model's class numbers, in stored order.

    A sample with an empty list is not scored. Raises UserError.
    """
    content = read_json_from_user(path, f"--accepted {path}", "[[1], [4, 7], [], ...]")
    if not isinstance(content, list) or not all(isinstance(entry, list) for entry in content):
        raise UserError(f"--accepted {path}: expected a list of lists of class numbers, such as [[1], [4, 7], []]")
    if len(content) != samples:
        raise UserError(f"--accepted {path}: has {len(content):,} entries, and the data {samples:,} samples")
    for number, entry in enumerate(content):
        if any(isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes for label in entry):
            raise UserError(f"--accepted {path}: entry {number} is {entry}: expected class numbers below {classes}")
    return content
