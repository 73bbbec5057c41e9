"""Compilation by region: torch.compile on repeated blocks, so that identical ones are compiled once."""

from torch import nn

from distrain.execution.recomputation import blocks_of
from distrain.kernels.compilation import allow_many_graphs
from distrain.models import DenseNet


def regions(network: nn.Module) -> list[nn.Module]:
    """The submodules to compile separately. In a DenseNet no two layers are alike, so there they are dense blocks."""
    return list(network.blocks) if isinstance(network, DenseNet) else list(blocks_of(network))


def compile_regions(network: nn.Module) -> None:
    """Compile the regions of a network in place, each at its first forward pass."""
    allow_many_graphs()  # regions share one function, so that the graphs of all count against one limit
    for region in regions(network):
        region.compile()
