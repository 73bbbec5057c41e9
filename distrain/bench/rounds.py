"""Interleaved measurement of several candidates."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Units per second of one candidate in each round."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def measure_interleaved(candidates: Mapping[str, Callable[[], int]], rounds: int) -> list[Rate]:
    """Run every candidate once to warm up, then all of them in turn, `rounds` times.

    A candidate does some work and returns the number of units processed.
    """
    for work in candidates.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            start = time.perf_counter()
            units = work()
            rates[name].append(units / (time.perf_counter() - start))
    return [Rate(name, tuple(values)) for name, values in rates.items()]


def ratio(rates: list[Rate], name: str, baseline: str) -> float:
    """Return the median over the rounds of a candidate's rate divided by the baseline's in the same round."""
    by_name = {rate.name: rate.rounds for rate in rates}
    return statistics.median(a / b for a, b in zip(by_name[name], by_name[baseline], strict=True))
