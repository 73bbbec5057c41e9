"""Dense blocks: the fastest of fused and layer-by-layer computation for this network on this device."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from distrain.config import Config
from distrain.execution.memory_format import DEFAULT, MEMORY_FORMATS
from distrain.execution.timing import images_per_second
from distrain.execution.trial import example_images, forward_backward
from distrain.models.fusion import Fusible, set_fused


def can_be_fused(network: nn.Module) -> bool:
    """Whether any module of a network has a fused operation."""
    return any(isinstance(module, Fusible) for module in network.modules())


def find_fastest_dense_block(
    config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]
) -> str:
    """Return "plain", "fused" or, on a GPU, "triton", whichever takes the least time for a forward and backward pass.

    Plain in a deterministic run, which must not depend on what is timed. Not plain in a compiled run, as compiling that
    takes minutes.
    """
    kinds = ["plain", "fused", *(["triton"] if device.type == "cuda" else [])]
    if config.train.deterministic:
        kinds, setting = ["plain"], "deterministic"
    elif config.train.compile:
        kinds, setting = kinds[1:], "compile"
    if len(kinds) == 1:
        info(f"train.dense_block=auto: {kinds[0]}, not measured because of train.{setting}")
        return kinds[0]
    name = config.train.memory_format
    memory_format = MEMORY_FORMATS[DEFAULT if name == "auto" else name]
    images = example_images(config, device, memory_format)
    passes = {}
    for kind in kinds:
        trial = copy.deepcopy(network).to(memory_format=memory_format)
        set_fused(trial, kind != "plain", config.train.compile, uses_triton=kind == "triton")
        passes[kind] = partial(forward_backward, trial, images, config.train.precision, memory_format)
    rates = images_per_second(passes, config.batch.per_lane, device)
    chosen = max(rates, key=lambda kind: rates[kind], default="fused")  # which takes less memory
    measured = ", ".join(f"{kind} {rate:,.0f} images/s" for kind, rate in rates.items())
    info(f"train.dense_block=auto: chose {chosen} ({measured or 'none fits the memory without recomputation'})")
    return chosen
