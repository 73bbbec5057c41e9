"""Memory format: the faster of channels_last and contiguous for this network on this device."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.timing import images_per_second
from distrain.execution.trial import example_images, forward_backward

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DEFAULT = "channels_last"
"""The format where none is measured."""


def find_faster_format(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> str:
    """Return the name of the memory format with the lower median time of a forward and backward pass.

    If one does not fit the memory without recomputation, none is timed.
    """
    passes = {}
    for name, memory_format in MEMORY_FORMATS.items():
        images = example_images(config, device, memory_format)
        trial = copy.deepcopy(network).to(memory_format=memory_format)
        passes[name] = partial(forward_backward, trial, images, config.train.precision, memory_format)
    rates = images_per_second(passes, config.batch.per_lane, device)
    if len(rates) < len(MEMORY_FORMATS):
        chosen = next(iter(rates), DEFAULT)
        info(f"train.memory_format=auto: {chosen}, not measured: a lane does not fit the memory without recomputation")
        return chosen
    fastest = max(rates, key=lambda name: rates[name])
    measured = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
    info(f"train.memory_format=auto: chose {fastest} ({measured})")
    return fastest
