"""Dense blocks: the faster of fused and layer-by-layer computation for this network on this device."""

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


def has_dense_blocks(network: nn.Module) -> bool:
    """Whether any part of a network has a fused operation."""
    return any(isinstance(module, Fusible) for module in network.modules())


def choose_dense_block(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> str:
    """Return "plain" or "fused", whichever takes less time for a forward and backward pass.

    Plain without a measurement in a deterministic run, which must not depend on what is timed; in a compiled one, as
    compiling plain blocks for a trial would take minutes; and on GPUs, where fused ones have not been tried yet.
    """
    reasons = {
        "of train.deterministic": config.train.deterministic,
        "of train.compile": config.train.compile,
        "fused dense blocks have not been tried on a GPU yet": device.type != "cpu",
    }
    if reason := next((text for text, applies in reasons.items() if applies), ""):
        info(f"train.dense_block=auto: plain, not measured because {reason}")
        return "plain"
    name = config.train.memory_format
    memory_format = MEMORY_FORMATS[DEFAULT if name == "auto" else name]
    images = example_images(config, device, memory_format)
    passes = {}
    for kind in ("plain", "fused"):
        trial = copy.deepcopy(network).to(memory_format=memory_format)
        set_fused(trial, kind == "fused")
        passes[kind] = partial(forward_backward, trial, images, config.train.precision, memory_format)
    rates = images_per_second(passes, config.batch.per_lane, device)
    chosen = max(rates, key=lambda kind: rates[kind])
    measured = ", ".join(f"{kind} {rate:,.0f} images/s" for kind, rate in rates.items())
    info(f"train.dense_block=auto: chose {chosen} ({measured})")
    return chosen
