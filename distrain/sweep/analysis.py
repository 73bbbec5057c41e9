"""Everything that a report says of one design space, computed once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distrain.sweep.population import Member
from distrain.sweep.statistics import (
    BestRange,
    Correlation,
    Distribution,
    Floats,
    Interval,
    Summary,
    best_ranges,
    correlate,
    distribution,
    errors_of,
    finished,
    progress,
    summarize,
)
from distrain.sweep.structure import COSTS, property_columns
from distrain.sweep.table import show_number


@dataclass(frozen=True)
class Analysis:
    """A design space."""

    members: Sequence[Member]
    finished: list[Member]
    """The best first."""
    errors: Floats
    """Of the finished ones: [n]."""
    columns: dict[str, Floats]
    """Properties of the finished ones by name, each [n]."""
    summary: Summary
    distribution: Distribution
    ranges: dict[str, BestRange]
    """Properties of the best networks."""
    correlations: dict[str, Correlation]
    """Of the time per step with each cost, over all members whose time was measured."""

    @property
    def progress(self) -> str:
        """Such as "18 of 25 done, 2 failed, 1 pruned, 4 waiting"."""
        return progress(self.members)

    @property
    def failed(self) -> list[Member]:
        """With a reason each."""
        return [member for member in self.members if member.status == "failed"]

    @property
    def typical(self) -> dict[str, Member]:
        """The best network and, unless it is the same, the one of median error; none if no network is finished."""
        if not self.finished:
            return {}
        best, median = self.finished[0], self.finished[(len(self.finished) - 1) // 2]
        return {"best": best} if median is best else {"best": best, "median": median}


def analyze(members: Sequence[Member], seed: int = 0) -> Analysis:
    """Analyze the members of one design space."""
    best_first, errors = finished(members), errors_of(members)
    columns = property_columns(best_first)
    seconds = np.array([math.nan if member.seconds is None else member.seconds for member in members])
    costs = {name: np.array([getattr(member, name) for member in members], np.float64) for name in COSTS}
    return Analysis(
        members=members,
        finished=best_first,
        errors=errors,
        columns=columns,
        summary=summarize(errors, seed),
        distribution=distribution(errors, seed),
        ranges=best_ranges(errors, columns, seed),
        correlations={name: correlate(costs[name], seconds, seed) for name in ("flops", "activations")},
    )


def show_error(found: Interval) -> str:
    """Such as "31.2% (30.8 to 31.9)", for fractions."""
    if math.isnan(found.value):
        return "-"
    interval = "" if math.isnan(found.low) else f" ({100 * found.low:.1f} to {100 * found.high:.1f})"
    return f"{100 * found.value:.1f}%{interval}"


def show_value(name: str, value: float) -> str:
    """The value of a property with its unit."""
    if name == "seconds":
        return f"{show_number(1000 * value)} ms"
    if name not in COSTS or value < 1000:
        return show_number(value)
    prefix, factor = next(
        (prefix, factor) for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= factor
    )
    return f"{show_number(value / factor)} {prefix}"


def show_range(name: str, found: Interval) -> str:
    """Such as "8 to 21"."""
    return f"{show_value(name, found.low)} to {show_value(name, found.high)}"
