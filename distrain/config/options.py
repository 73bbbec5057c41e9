"""Fields of the configuration that document and check themselves."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from distrain.errors import UserError, nearest
from distrain.masking import MASK

OnResume = Literal["fixed", "changeable", "free"]


def option(
    default: Any,
    help: str,
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    length: int | None = None,
    location: bool = False,
    on_resume: OnResume = "fixed",
) -> Any:
    """A dataclass field with its one-line meaning, which `--print-config` prints beside the value.

    A Literal type lists the allowed values. `min` and `max` are inclusive bounds, `above` and `below` exclusive ones;
    in a list they hold for every item, of which there must be `length`. A `location` is a path or a URL; a leading ~
    is the home folder. When a run resumes, a `fixed` value must be the same, a `changeable` one may change if
    `run.change` names it, a `free` one may always differ.
    """
    bounds = {"min": min, "max": max, "above": above, "below": below, "length": length}
    metadata = {"help": help, "on_resume": on_resume, "location": location, **bounds}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class Section:
    """Base of the configuration's dataclasses: checks every field against its type and bounds, and expands ~."""

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for entry in fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            key, value = f"{self.name_in_config()}.{entry.name}", getattr(self, entry.name)
            check_choice(key, value, types[entry.name])
            _check_bounds(key, value, entry)
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_text(key, text)
            if entry.metadata["location"]:
                setattr(self, entry.name, _expand_home(key, value))

    @classmethod
    def name_in_config(cls) -> str:
        """The section's key: `data` for DataConfig."""
        return cls.__name__.removesuffix("Config").lower()


def choices(kind: Any) -> Sequence[str]:
    """The values a Literal type allows; none for any other type."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def check_choice(key: str, value: Any, kind: Any) -> None:
    """Raises UserError if `value` is not among the choices of `kind`, naming the nearest one."""
    if (known := choices(kind)) and value not in known:
        raise UserError(f"{key}={value} is not known: {nearest(str(value), known)}")


def check_text(key: str, text: str) -> None:
    """Raises UserError for text that files, logs and scripts cannot hold in one line, and for a masked secret."""
    kinds = set(map(unicodedata.category, text))
    if "Cs" in kinds:
        raise UserError(f"{key}={text!r} is not UTF-8: rename it")
    if kinds & {"Cc", "Zl", "Zp"}:
        raise UserError(f"{key}={text!r} contains a line break or another control character: remove it")
    if MASK in text:
        raise UserError(f"{key}={text}: {MASK} replaced a secret when these settings were written: set {key} again")


def _expand_home(key: str, location: str) -> str:
    if not location.startswith("~"):
        return location
    try:
        return str(Path(location).expanduser())
    except RuntimeError as error:
        home = location.partition("/")[0]
        raise UserError(f"{key}={location}: no home folder of {home}: write ./{location} for a folder here") from error


def _check_bounds(key: str, value: Any, entry: "Field[Any]") -> None:
    if not _is_finite(value):
        raise UserError(f"{key}={value} must be finite")
    length, numbers = entry.metadata["length"], value if isinstance(value, list) else [value]
    if length is not None and len(numbers) != length:
        raise UserError(f"{key}={value} must be a list of {length} numbers")
    low, high, above, below = (entry.metadata[name] for name in ("min", "max", "above", "below"))
    if all(
        (low is None or number >= low)
        and (high is None or number <= high)
        and (above is None or number > above)
        and (below is None or number < below)
        for number in numbers
        if isinstance(number, (int, float))
    ):
        return
    each = "every item " if isinstance(value, list) else ""
    raise UserError(f"{key}={value}: {each}must be {_range(low, high, above, below)}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _range(low: float | None, high: float | None, above: float | None, below: float | None) -> str:
    if high is None and below is None:
        return f"at least {low:g}" if above is None else f"greater than {above:g}"
    left = f"[{low:g}" if above is None else f"({above:g}"
    return f"in {left}, {high:g}]" if below is None else f"in {left}, {below:g})"
