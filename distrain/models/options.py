"""Model options: checked as users write them, and converted to configuration dataclasses."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from distrain.errors import UserError, nearest

Kind = TypeVar("Kind")
_types_of = cache(get_type_hints)


def create(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Build the dataclass `kind` from plain values. Raises UserError with `where` and the invalid option."""
    checked = check(kind, values, where)
    required = [
        entry.name
        for entry in fields(kind)  # type: ignore[arg-type]
        if entry.default is MISSING and entry.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in checked]:
        raise UserError(f"{where}: missing options: {', '.join(missing)}")
    return kind(**checked)


def check(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with YAML lists and mappings converted to the field types of `kind`. Raises UserError."""
    types = _types_of(kind)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{where} has no option {name!r}: {nearest(str(name), types)}")
        checked[name] = _convert(types[name], value, f"{where}: option {name}")
    return checked


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raise UserError for a value that the Literal type does not list."""
    if value not in get_args(literal):
        raise UserError(f"{name}={value} is not known: it must be one of {', '.join(get_args(literal))}")


def check_probability(name: str, value: float) -> None:
    """Raise UserError for a value outside [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"{name}={value:g} is a probability: it must be in [0, 1)")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        item_kind = get_args(kind)[0]
        return tuple(_convert(item_kind, item, f"{where}, item {n}") for n, item in enumerate(value, 1))
    if is_dataclass(kind) and isinstance(value, Mapping):
        return create(kind, value, where)  # type: ignore[arg-type]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where} must be finite, not {value}")
    plain = {Literal: str, tuple: tuple}.get(get_origin(kind), kind)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise UserError(f"{where} must be {_expected(kind)}, not {value!r}")
    return value


def _expected(kind: Any) -> str:
    """Return how a type reads in an error message."""
    if get_origin(kind) is tuple:
        return f"a list, each item {_expected(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if is_dataclass(kind):
        return "a mapping of " + ", ".join(entry.name for entry in fields(kind))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
