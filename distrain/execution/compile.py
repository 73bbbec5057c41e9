"""Compilation by region: torch.compile on repeated blocks, so that identical ones are compiled once."""

import torch
from torch import nn

from distrain.execution.recomputation import blocks_of
from distrain.models import DenseNet

_MAX_GRAPHS = 64  # of all regions together, in training and validation and for every image size


def regions(network: nn.Module) -> list[nn.Module]:
    """The submodules to compile separately. In a DenseNet no two layers are alike, so there they are dense blocks."""
    return list(network.blocks) if isinstance(network, DenseNet) else list(blocks_of(network))


def compile_regions(network: nn.Module) -> None:
    """Compile the regions of a network in place, each at its first forward pass."""
    # Regions share one function, so that the graphs of all, in training, validation and for every image size, count
    # against one limit. What exceeds it runs without being compiled, and torch only logs that.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    for region in regions(network):
        region.compile()
