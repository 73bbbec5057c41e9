"""Prepare a network for its device: memory format, recomputation, micro-batches that fit, compilation.

What is measured is measured once in the life of a run and kept, because another choice rounds differently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distrain.config import Config
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.compile import compile_regions
from distrain.execution.fitting import fit_memory
from distrain.execution.memory_format import MEMORY_FORMATS, find_faster_format
from distrain.execution.recomputation import blocks_of, find_least_level, recompute_level, set_level
from distrain.execution.trial import example_images, forward_backward
from distrain.models.freezing import FrozenBatchNorm2d
from distrain.parallel.group import Group


@dataclass(frozen=True)
class Execution:
    """How the network of a run is executed."""

    memory_format: torch.memory_format
    """Of the images that the network receives."""
    splits: int
    """Micro-batches that the batch of a lane is split into; more than one if it does not fit the device's memory."""


def prepare(config: Config, network: nn.Module, group: Group, info: Callable[[str], None]) -> Execution:
    """Set up `network` in place as configured, and return what the training loop has to know. All ranks call this.

    Raises UserError if the device cannot do what is configured.
    """
    decisions = RunDecisions(config.run.folder)

    def decide(name: str, measure: Callable[[], Any]) -> Any:
        return group.broadcast(decisions.get(name, measure) if group.is_main else None)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.parallel.batch_norm == "sync":
        _convert_to_sync_batch_norm(network, group)

    name = config.train.memory_format
    if name == "auto":
        name = decide("memory_format", partial(find_faster_format, config, network, group.device, info))
    memory_format = MEMORY_FORMATS[name]
    network.to(memory_format=memory_format)

    blocks = blocks_of(network)
    if config.train.recompute == "auto":
        level = decide("recompute_level", partial(find_least_level, config, network, group.device, info))
    else:
        level = recompute_level(config.train.recompute, blocks)
    set_level(blocks, level)

    splits = int(decide("lane_splits", lambda: 1))
    # On a CPU, a process that allocates too much is killed without an exception to catch.
    if group.device.type == "cuda" and config.parallel.batch_norm == "lane":
        images = example_images(config, group.device, memory_format)
        trial_step = partial(forward_backward, precision=config.train.precision)
        splits = fit_memory(network, images, splits, group, trial_step, info)
        if group.is_main:
            decisions.set("lane_splits", splits)
    if config.train.compile:
        compile_regions(network)
    return Execution(memory_format, splits)


def _convert_to_sync_batch_norm(network: nn.Module, group: Group) -> None:
    if group.device.type != "cuda":
        raise UserError("parallel.batch_norm=sync works on GPUs only: set parallel.batch_norm=lane")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and not isinstance(child, FrozenBatchNorm2d):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
