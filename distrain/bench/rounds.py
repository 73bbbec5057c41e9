"""Measuring several contestants in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Units per second of one contestant in each round."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def measure_in_turns(candidates: Mapping[str, Callable[[], int]], rounds: int) -> list[Rate]:
    """Run every contestant once to warm up, then all of them in turn, `rounds` times.

    A contestant does some work and returns how many units it was.
    """
    for work in candidates.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            began = time.perf_counter()
            units = work()
            rates[name].append(units / (time.perf_counter() - began))
    return [Rate(name, tuple(values)) for name, values in rates.items()]


def ratio(rates: list[Rate], name: str, to: str) -> float:
    """Median over the rounds of one contestant's rate over another's in the same round."""
    by_name = {rate.name: rate.rounds for rate in rates}
    return statistics.median(a / b for a, b in zip(by_name[name], by_name[to], strict=True))
