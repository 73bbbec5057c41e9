"""The values that a parameter may have, and how likely they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from distrain.errors import UserError

Value = int | float | str | bool
FORMS = "{uniform: [LOW, HIGH]}, {log: [LOW, HIGH]} or {choice: [A, B, ...]}"
TEXT_FORMS = "LOW..HIGH or log:LOW..HIGH, with :STEP at the end for multiples of it, or choice:A,B,..."


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`, uniform or log-uniform, in multiples of `step`; or equally likely choices."""

    kind: Literal["uniform", "log", "choice"]
    low: float = 0.0
    high: float = 0.0
    step: float = 0.0
    """0: any real number."""
    choices: tuple[Value, ...] = ()

    @classmethod
    def parse(cls, entry: Mapping[str, Any], where: str) -> "Range":
        """Read {uniform: [1, 16]}, {log: [8, 256], step: 8} or {choice: [1, 2, 4]}. `step` is 1 between integers.

        Raises UserError, which begins with `where`.
        """
        kinds = [kind for kind in ("uniform", "log", "choice") if kind in entry]
        if len(kinds) != 1:
            raise UserError(f"{where}: write {FORMS}")
        kind: Any = kinds[0]
        values = entry[kind]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise UserError(f"{where}: write {FORMS}")
        if kind == "choice":
            if not values or not all(isinstance(value, Value) for value in values) or "step" in entry:
                raise UserError(f"{where}: choice needs a list of numbers or words, and no step")
            return cls("choice", choices=tuple(values))
        if len(values) != 2 or not all(_is_number(value) for value in values):
            raise UserError(f"{where}: {kind} needs two numbers, [LOW, HIGH]")
        low, high = values
        step = entry.get("step", 1 if type(low) is type(high) is int else 0)
        if not _is_number(step) or step < 0:
            raise UserError(f"{where}: step must be a positive number, not {step!r}")
        if not low < high or (kind == "log" and low <= 0):
            raise UserError(f"{where}: {kind} needs LOW < HIGH{', both above 0' if kind == 'log' else ''}")
        found = cls(kind, low, high, step)
        if found.count < 1:
            raise UserError(f"{where}: no multiple of {step:g} lies between {low:g} and {high:g}")
        return found

    @classmethod
    def from_text(cls, text: str, where: str, read: Callable[[str], Value]) -> "Range":
        """Read 1..16, log:8..256:8 or choice:1,2,4 as `parse` does, each value by `read`.

        Raises UserError, which begins with `where`, and what `read` raises.
        """
        kind, _, rest = text.partition(":")
        if kind == "choice":
            return cls.parse({"choice": [read(word) for word in rest.split(",")]}, where)
        bounds, colon, step = (rest if kind == "log" else text).partition(":")
        low, dots, high = bounds.partition("..")
        if not dots:
            raise UserError(f"{where}: write {TEXT_FORMS}")
        entry: dict[str, Any] = {"log" if kind == "log" else "uniform": [read(low), read(high)]}
        return cls.parse({**entry, "step": read(step)} if colon else entry, where)

    def draw(self, uniform: float) -> Value:
        """The value at `uniform`, a number in [0, 1)."""
        if self.kind == "choice":
            return self.choices[int(uniform * len(self.choices))]
        if self.kind == "uniform" and self.step:  # every multiple equally likely
            first, last = self._multiples
            return self._multiple(first + int(uniform * (last - first + 1)))
        if self.kind == "uniform":
            return self.low + uniform * (self.high - self.low)
        return self.round(self.low * (self.high / self.low) ** uniform)

    def nearest(self, value: float) -> Value:
        """The value of the range nearest to a number; of numbers as choices, by their ratio."""
        if self.kind == "choice":
            numbers = [one for one in self.choices if isinstance(one, (int, float)) and one > 0]
            return min(numbers, key=lambda one: abs(math.log(one / value)), default=self.choices[0])
        return self.round(value)

    def round(self, value: float) -> int | float:
        """The multiple of `step` that is nearest to a number, or the number; within the range."""
        if not self.step:
            return min(max(value, self.low), self.high)
        first, last = self._multiples
        return self._multiple(min(max(round(value / self.step), first), last))

    def __contains__(self, value: object) -> bool:
        if self.kind == "choice":
            return value in self.choices
        if not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        return math.isclose(self.round(value), value)

    @property
    def ends(self) -> tuple[Value, ...]:
        """The smallest and the largest value; of choices all."""
        if self.kind == "choice":
            return self.choices
        if not self.step:
            return self.low, self.high
        first, last = self._multiples
        return self._multiple(first), self._multiple(last)

    @property
    def count(self) -> float:
        """How many values there are; infinitely many without a step."""
        if self.kind == "choice":
            return len(set(self.choices))
        if not self.step:
            return math.inf
        first, last = self._multiples
        return last - first + 1

    @cached_property
    def _multiples(self) -> tuple[int, int]:
        """The first and the last multiple of `step`."""
        tolerance = 1e-9
        return math.ceil(self.low / self.step - tolerance), math.floor(self.high / self.step + tolerance)

    def _multiple(self, number: int) -> int | float:
        if isinstance(self.step, int):
            return number * self.step
        return round(number * self.step, self._digits)

    @cached_property
    def _digits(self) -> int:
        """Decimal places of a multiple, one more than `step` begins with."""
        return max(0, 1 - math.floor(math.log10(self.step)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
