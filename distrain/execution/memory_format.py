"""Memory format: the faster of channels_last and contiguous for this network on this device."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.trial import example_images, forward_backward, is_out_of_memory

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DEFAULT = "channels_last"
"""The format where none is measured."""
_ROUNDS = 5


def find_faster_format(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> str:
    """Return the name of the memory format with the lower median time of a forward and backward pass.

    The formats are timed alternately, so that a drift of the clock rate affects both. One that does not fit the memory
    without recomputation is not timed.
    """
    passes = {}
    for name, memory_format in MEMORY_FORMATS.items():
        images = example_images(config, device, memory_format)
        trial = copy.deepcopy(network).to(memory_format=memory_format)
        passes[name] = partial(forward_backward, trial, images, config.train.precision, memory_format)
        try:
            passes[name]()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            del passes[name]
    if len(passes) < len(MEMORY_FORMATS):
        chosen = next(iter(passes), DEFAULT)
        info(f"train.memory_format=auto: {chosen}, not measured: a lane does not fit the memory without recomputation")
        return chosen
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(_ROUNDS):
        for name, run in passes.items():
            seconds[name].append(_time(run, device))
    rates = {name: config.batch.per_lane / statistics.median(times) for name, times in seconds.items()}
    fastest = max(rates, key=lambda name: rates[name])
    measured = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
    info(f"train.memory_format=auto: chose {fastest} ({measured})")
    return fastest


def _time(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, including the work it leaves on the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start
