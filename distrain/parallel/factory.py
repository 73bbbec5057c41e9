"""Open the configured strategy."""

import torch

from distrain.config import Config
from distrain.execution.precision import Autocast
from distrain.parallel.ddp import DDP
from distrain.parallel.group import Group
from distrain.parallel.strategy import State, Strategy
from distrain.parallel.zero import Zero


def open_strategy(
    config: Config,
    network: Autocast,
    group: Group,
    micro_batches: int,
    example: torch.Tensor,
    saved: State | None,
    flat: bool = False,
) -> Strategy:
    """Return the configured strategy, restored from a `saved` state of any strategy and number of ranks.

    `micro_batches` counts those of a step over all ranks; `example` is one of them, images on the device. `flat`: keep
    gradients in one tensor, under ddp.
    """
    if config.parallel.strategy == "ddp":
        return DDP(config, network, group, micro_batches, example, flat, saved)
    return Zero(config, network, group, micro_batches, saved)
