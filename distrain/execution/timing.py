"""Timing of alternatives on the device of a run."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from distrain.execution.trial import is_out_of_memory

_ROUNDS = 5


def images_per_second(passes: Mapping[str, Callable[[], None]], images: int, device: torch.device) -> dict[str, float]:
    """Call each of `passes` over that many images in turn, and return the median rate of those that fit the memory.

    In turn, so that a drift of the clock rate affects all of them.
    """
    fitting = {name: run for name, run in passes.items() if _fits(run)}
    seconds: dict[str, list[float]] = {name: [] for name in fitting}
    for _ in range(_ROUNDS):
        for name, run in fitting.items():
            seconds[name].append(_time(run, device))
    return {name: images / statistics.median(times) for name, times in seconds.items()}


def _fits(run: Callable[[], None]) -> bool:
    try:
        run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, including the work it leaves on the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
