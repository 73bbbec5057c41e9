"""Interleaved measurement of several candidates."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

Timer: TypeAlias = Callable[[Callable[[], int]], tuple[int, float]]
"""Runs a candidate once; returns the units it has processed and the seconds that took."""


@dataclass(frozen=True)
class Rate:
    """Units per second of one candidate in each round."""

    name: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def time_on_host(work: Callable[[], int]) -> tuple[int, float]:
    """The timer of candidates that are done when they return."""
    start = time.perf_counter()
    units = work()
    return units, time.perf_counter() - start


def time_on_gpu(work: Callable[[], int]) -> tuple[int, float]:
    """The timer of candidates that leave work on the current GPU: from its start to its end there."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    units = work()
    end.record()
    torch.cuda.synchronize()
    return units, start.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given. Returns at once on a CPU, which has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_interleaved(
    candidates: Mapping[str, Callable[[], int]], rounds: int, timer: Timer = time_on_host
) -> list[Rate]:
    """Run every candidate once to warm up, then all of them in turn, `rounds` times.

    A candidate does some work and returns the number of units processed.
    """
    for work in candidates.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            units, seconds = timer(work)
            rates[name].append(units / seconds)
    return [Rate(name, tuple(values)) for name, values in rates.items()]


def ratio(rates: list[Rate], name: str, baseline: str) -> float:
    """Return the median over the rounds of a candidate's rate divided by the baseline's in the same round."""
    by_name = {rate.name: rate.rounds for rate in rates}
    return statistics.median(a / b for a, b in zip(by_name[name], by_name[baseline], strict=True))


def free(device: torch.device) -> None:
    """Return what no tensor uses to the device, once their owners are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
