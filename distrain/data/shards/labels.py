"""Labels as numbers or as class names, never both in one data set; lists of class names.

Names are compared in Unicode's composed form (NFC): macOS writes an accented letter as two characters, others as one.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import pad_labels
from distrain.data.storage.client import error_reason
from distrain.errors import UserError, nearest

Kind = Literal["auto", "names", "numbers"]
"""What --labels says the labels are."""

_MAX_CLASSES = 1_000_000  # a larger label is a mistake, where the number of classes is not given
_NUMBER = re.compile("[0-9]{1,9}")
_NUMBERS = re.compile(r"[0-9]+([\s,;]+[0-9]+)*")
_PLAIN_NUMBER = re.compile("0|[1-9][0-9]{0,8}")


class Reading(NamedTuple):
    """The two meanings of one label: as a number and as the position of a class name; -1 where it cannot be one."""

    number: int
    name: int


class Readings(NamedTuple):
    """Readings of n labels, int32 [n] each."""

    number: NDArray[np.int32]
    name: NDArray[np.int32]


class LabelReader:
    """Reads labels one by one; `decide` then tells for all of them together whether they are names or numbers."""

    def __init__(self, classes: Sequence[str] | None, kind: Kind = "auto") -> None:
        """`classes` are the names in the order of their labels, if known."""
        if kind == "names" and classes is None:
            raise UserError("--labels names needs the class names in the order of their labels: pass --classes FILE")
        self._classes = classes
        self._kind = kind
        self._position = {name: number for number, name in enumerate(classes or ())}
        self._limit = _MAX_CLASSES if classes is None else len(classes)

    def read(self, where: str, text: str) -> Reading:
        """Raises UserError for a label that is neither a number below the number of classes nor a class name."""
        text = composed(text)
        number = int(text) if _NUMBER.fullmatch(text) else -1
        name = self._position.get(text, -1)
        if self._kind == "names":
            number = -1
        elif self._kind == "numbers":
            name = -1
        if 0 <= number < self._limit or name >= 0:
            return Reading(number if number < self._limit else -1, name)
        raise UserError(f"{where} has label {self._problem(text)}")

    def decide(self, readings: Readings, source: str) -> NDArray[np.int32]:
        """Return the labels, int32 [n]. Raises UserError, which begins with `source`, if their kind is uncertain.

        They are names if all are names of classes and some cannot be numbers, or every class occurs; they are numbers
        if all are numbers and none is also the name of a class with another number.
        """
        number, name = readings
        are_names, are_numbers = bool((name >= 0).all()), bool((number >= 0).all())
        if are_names and (not are_numbers or len(np.unique(name)) == self._limit):
            return name
        differ = (name >= 0) & (name != number)
        if are_numbers and not differ.any():
            return number
        raise UserError(f"{source}: {self._ambiguous(number, name, differ) if are_numbers else self._mixed(*readings)}")

    def _problem(self, text: str) -> str:
        if self._kind == "names":
            return f"{text!r}, which is not a class: {nearest(text, self._position)}"
        if text.isascii() and text.isdigit():
            return f"{text if len(text) < 20 else text[:20] + '...'}, outside 0..{self._limit - 1}"
        if self._kind == "numbers":
            return f"{text!r}, which is not a number"
        if self._classes is None:
            return f"{text!r}, which is not a number; pass the list of classes to use names"
        return f"{text!r}, which is neither a number nor a class: {nearest(text, self._position)}"

    def _mixed(self, number: NDArray[np.int32], name: NDArray[np.int32]) -> str:
        assert self._classes is not None
        a_number, a_name = int(number[np.argmax(name < 0)]), self._classes[int(name[np.argmax(number < 0)])]
        return (
            f"labels are names and numbers, such as {a_name!r} and {a_number}, and no class is called "
            f"'{a_number}': use one kind, or correct --classes"
        )

    def _ambiguous(self, number: NDArray[np.int32], name: NDArray[np.int32], differ: NDArray[np.bool_]) -> str:
        assert self._classes is not None
        first = int(np.argmax(differ))
        label, position = int(number[first]), int(name[first])
        return (
            f"label {label} could be number {label} of --classes, {self._classes[label]!r}, or the class called "
            f"{self._classes[position]!r}: pass --labels numbers or --labels names"
        )


def read_column(
    labels: Sequence[tuple[str, str]], classes: Sequence[str] | None, kind: Kind, source: str
) -> tuple[NDArray[np.int32], list[str], str]:
    """Return labels, int32 [n], class names and a remark for the user, from (where, text) of each label of `source`.

    Without `classes` the labels are numbers if all are, else names, sorted. Raises UserError.
    """
    texts = [composed(text) for _, text in labels]
    remark = ""
    for (where, _), text in zip(labels, texts, strict=True):
        if text != text.strip():
            raise UserError(f"{where} has label {text!r}; remove the spaces around it")
    if classes is None:
        classes, remark = _name_classes(labels, texts, kind)
    reader = LabelReader(classes, kind)
    readings = [reader.read(where, text) for (where, _), text in zip(labels, texts, strict=True)]
    columns = np.array(readings, np.int32).reshape(-1, 2)
    if classes is None:
        numbers = columns[:, 0]
        return numbers, [str(number) for number in range(int(numbers.max(initial=-1)) + 1)], remark
    return reader.decide(Readings(columns[:, 0], columns[:, 1]), source), list(classes), remark


def read_sets(
    labels: Sequence[tuple[str, str]], classes: Sequence[str] | None, kind: Kind, source: str
) -> tuple[NDArray[np.int32], list[str], str]:
    """The same for multi-label data, where each text lists any number of labels: int32 [n, m] as in `Index`."""
    sets = [split_labels(where, text) for where, text in labels]
    each = [(where, text) for (where, _), texts in zip(labels, sets, strict=True) for text in texts]
    if not each:
        raise UserError(f"{source}: no image has a label")
    label, names, remark = read_column(each, classes, kind, source)
    return pad_labels(label, np.array([len(texts) for texts in sets], np.int64)), names, remark


def split_labels(where: str, text: str) -> list[str]:
    """Split a list of labels: names at semicolons and line ends, numbers also at commas and blanks.

    Raises UserError for an empty or a repeated label.
    """
    if not text.strip():
        return []
    separator = r"[\s,;]+" if _NUMBERS.fullmatch(text.strip()) else r"[;\n]"
    return check_set(where, [label.strip() for label in re.split(separator, text.strip())])


def lists_numbers(text: str) -> bool:
    """Whether a text is a list of several numbers."""
    return _NUMBERS.fullmatch(text) is not None and not text.isdigit()


def check_set(where: str, labels: list[str]) -> list[str]:
    """Return the labels of a sample. Raises UserError if one is empty or repeated."""
    if "" in labels:
        raise UserError(f"{where} has an empty label in its list; delete it")
    if repeated := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"{where} has label {repeated!r} more than once; list each label of the image once")
    return labels


def _name_classes(labels: Sequence[tuple[str, str]], texts: Sequence[str], kind: Kind) -> tuple[list[str] | None, str]:
    """Return the sorted names, or None if labels are numbers; and a remark. Raises UserError for a doubtful column."""
    if kind == "numbers":
        return None, ""
    remark = ""
    if kind == "auto":
        odd = next((number for number, text in enumerate(texts) if not _PLAIN_NUMBER.fullmatch(text)), None)
        if odd is None:
            return None, ""
        if all(_looks_numeric(text) for text in texts):
            reads = "could be a number or a name" if _NUMBER.fullmatch(texts[odd]) else "is not a number from 0"
            raise UserError(
                f"{labels[odd][0]} has label {texts[odd]!r}, which {reads}: correct it, or pass --labels numbers or "
                "--labels names"
            )
        named = next(number for number, text in enumerate(texts) if not _looks_numeric(text))
        if any(map(_looks_numeric, texts)):
            remark = f"labels are taken as names, because {labels[named][0]} has label {texts[named]!r}"
    for (where, _), text in zip(labels, texts, strict=True):
        if not text.isprintable():  # as a class of its own it would look like another one
            raise UserError(f"{where} has invisible characters in label {text!r}; delete them")
    names = sorted(set(texts))
    refuse_case_variants(names, "correct the labels, or list both with --classes FILE")
    return names, remark


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_classes(file: Path) -> list[str]:
    """Read class names, one per line in the order of their labels. Raises UserError naming the line."""
    try:
        # Not splitlines(), which also splits at rarer characters.
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error_reason(error)}") from error
    names = [composed(line.strip()) for line in lines]
    if names == [""]:
        raise UserError(f"{file}: no class names found; write one per line")
    found: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{file}: line {number} is blank; delete it, or write the name of class {number - 1}")
        if name in found:
            raise UserError(f"{file}: class {name} is listed more than once, in lines {found[name]} and {number}")
        if not name.isprintable():
            raise UserError(f"{file}: line {number} has invisible characters: {name!r}; delete them")
        found[name] = number
    return names


def composed(name: str) -> str:
    """Return a name in Unicode's composed form, in which equal names are equal strings."""
    return unicodedata.normalize("NFC", name)


def refuse_case_variants(names: Iterable[str], cure: str) -> None:
    """Raises UserError if two names differ only in upper and lower case, since they are most likely one class."""
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"classes {other} and {name} differ only in upper and lower case: {cure}")


def name_from_folder(folder: str, entry: str) -> str:
    """Return the class named by a folder. Raises UserError if its name is not text or could be taken for another."""
    try:
        entry.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder}: the name of class folder {os.fsencode(entry)!r} is not UTF-8; rename it") from error
    name = composed(entry)
    if not name.isprintable() or name != name.strip():
        raise UserError(
            f"{folder}: the name of class folder {name!r} has spaces around it or invisible characters; rename it"
        )
    return name
