"""Fused operations in place of layer-by-layer ones: where they apply, and the running statistics they leave."""

from collections.abc import Sequence

import torch
from torch import nn

from distrain.kernels.choice import TORCH, Kernels
from distrain.kernels.norm_relu_pool import Pool, norm_relu_pool


class Fusible(nn.Module):
    """A module whose training step one of `distrain.kernels` can compute as a whole."""

    is_fused = False
    """Whether to use it where it applies."""
    kernels = TORCH
    """What it is computed by."""


def set_fused(network: nn.Module, is_fused: bool, kernels: Kernels = TORCH) -> None:
    """Choose between fused and layer-by-layer computation of the blocks of `network`: the same up to rounding."""
    for module in network.modules():
        if isinstance(module, Fusible):
            module.is_fused, module.kernels = is_fused, kernels


def normalizes_by_batch(norms: Sequence[nn.Module], x: torch.Tensor) -> bool:
    """Whether all these layers normalize by the batch of `x`, with one eps, and are not compiled or exported.

    That of a single value is left to them, as they report it.
    """
    return (
        not torch.compiler.is_compiling()
        and x.numel() > x.shape[1]
        and all(
            isinstance(norm, nn.BatchNorm2d)
            and norm.training
            and norm.affine
            and norm.track_running_stats
            and norm.momentum is not None
            for norm in norms
        )
        and len({getattr(norm, "eps", None) for norm in norms}) == 1
    )


@torch.no_grad()
def update_running_statistics(norms: Sequence[nn.BatchNorm2d], statistics: Sequence[torch.Tensor], count: int) -> None:
    """Update the running statistics of `norms` as a training step does.

    `statistics`: for each, mean and biased variance [2, channels] of a batch of `count` values a channel, of which the
    running variance is unbiased.
    """
    running: list[torch.Tensor] = []
    new: list[torch.Tensor] = []
    kept: list[float] = []
    added: list[float] = []
    for norm, (mean, variance) in zip(norms, statistics, strict=True):
        assert norm.momentum is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        running += [norm.running_mean, norm.running_var]
        new += [mean, variance]
        kept += [1 - norm.momentum] * 2
        added += [norm.momentum, norm.momentum * count / (count - 1)]
        if type(norm) is nn.BatchNorm2d:  # others leave it to parallel.LaneStatistics
            norm.num_batches_tracked.add_(1)
    torch._foreach_mul_(running, kept)
    torch._foreach_add_(running, torch._foreach_mul(new, added))


def fused_norm_relu_pool(x: torch.Tensor, norm: nn.BatchNorm2d, pool: Pool, compiled: bool) -> torch.Tensor:
    """`norm_relu_pool` with the parameters of `norm`, whose running statistics it updates."""
    pooled, statistics = norm_relu_pool(x, norm.weight, norm.bias, norm.eps, pool, compiled)
    update_running_statistics([norm], [statistics], count=x.numel() // x.shape[1])
    return pooled
