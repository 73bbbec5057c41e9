"""BN, ReLU and pooling as one operation that keeps its input, and of a maximum where it is.

That is what follows the convolution of an ImageNet stem, and what a transition does to the maps of a block. In the
paper the 1x1 of a transition comes before the pooling; being linear, it commutes with an average, and after it it reads
a quarter of the pixels.
"""

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from distrain.kernels.normalization import Norm, images_of, moments, normalize_relu, normalize_relu_backward, rows_of

Pool = Literal["average", "max"]
_WINDOWS: dict[Pool, tuple[int, int, int]] = {"average": (2, 2, 0), "max": (3, 2, 1)}  # size, stride, padding


def norm_relu_pool(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float, pool: Pool, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize x [n, c, h, w] by its batch, apply ReLU and pool: an average of 2x2 or a maximum of 3x3, of stride 2.

    Returns the pooled maps [n, c, h', w'], channels last, and mean and biased variance of `x`, [2, c].
    """
    with torch.autocast(x.device.type, enabled=False):
        pooled, statistics = _NormReluPool.apply(x, gamma, beta, eps, pool, compiled)
    return pooled, statistics


class _NormReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float, pool: Pool, compiled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        statistics = moments(rows_of(x))
        size, stride, padding = _WINDOWS[pool]
        a = _activation(x, Norm(statistics, gamma, beta, eps), compiled)
        if pool == "average":
            pooled, indices = torch.ops.aten.avg_pool2d(a, [size, size], [stride, stride]), None
        else:
            pooled, indices = torch.ops.aten.max_pool2d_with_indices(a, size, stride, padding)
            indices = indices.int()
        ctx.save_for_backward(x, statistics, gamma, beta, indices)
        ctx.eps, ctx.pool, ctx.compiled = eps, pool, compiled
        ctx.mark_non_differentiable(statistics)
        return pooled, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, statistics, gamma, beta, indices = ctx.saved_tensors
        norm = Norm(statistics, gamma, beta, ctx.eps)
        a = _activation(x, norm, ctx.compiled)
        window = [[number, number] for number in _WINDOWS[ctx.pool]]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if indices is None:
            of_a = torch.ops.aten.avg_pool2d_backward(gradient, a, *window, False, True, None)
        else:
            of_a = torch.ops.aten.max_pool2d_with_indices_backward(gradient, a, *window, [1, 1], False, indices.long())
        of_x, of_gamma, of_beta = normalize_relu_backward(rows_of(of_a), rows_of(a), rows_of(x), norm, ctx.compiled)
        return images_of(of_x, x.shape), of_gamma, of_beta, None, None, None


def _activation(x: torch.Tensor, norm: Norm, compiled: bool) -> torch.Tensor:
    """max(0, BN(x)) of maps [n, c, h, w]."""
    return images_of(normalize_relu(rows_of(x), norm, compiled), x.shape)
