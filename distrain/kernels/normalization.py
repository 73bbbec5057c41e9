"""Batch normalization and ReLU as passes over rows of pixels: by torch's kernels, or compiled from plain operations.

Maps in channels-last order are a matrix of M = n h w rows, one per pixel, with a column per channel. With mean m and
variance v of a column (Ioffe and Szegedy 2015, algorithm 1),

    x^ = (x - m) r,   r = 1 / sqrt(v + eps),   BN(x) = gamma x^ + beta = x s + t,   s = gamma r,   t = beta - m s

torch's own kernels need a pass each to gather columns, normalize and apply ReLU. Compiled, they are one pass.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from distrain.kernels.compilation import allow_many_graphs


class Norm(NamedTuple):
    """A batch normalization by given statistics."""

    statistics: torch.Tensor
    """m and v, [2, columns]."""
    gamma: torch.Tensor
    beta: torch.Tensor
    eps: float

    @property
    def mean(self) -> torch.Tensor:
        """m, [columns]."""
        return self.statistics[0]

    @property
    def inverse(self) -> torch.Tensor:
        """r, [columns]."""
        return (self.statistics[1] + self.eps).rsqrt()

    @property
    def scale(self) -> torch.Tensor:
        """s, [columns]."""
        return self.gamma * self.inverse


def normalize_relu(x: torch.Tensor, norm: Norm, compiled: bool) -> torch.Tensor:
    """a = max(0, BN(x)), [M, columns], rounded once."""
    if compiled:
        scale = norm.scale
        a: torch.Tensor = _compiled(_scale_shift_relu)(x, scale, norm.beta - norm.mean * scale)
        return a
    normalized = torch.ops.aten.native_batch_norm(
        as_line(x.contiguous()), norm.gamma, norm.beta, *norm.statistics, False, 0.0, norm.eps
    )[0]
    return rows_of(normalized.relu_())


def accumulate_direct(
    of_a: torch.Tensor, a: torch.Tensor, x: torch.Tensor, norm: Norm, total: torch.Tensor, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add D s to `total`, [M, columns], where D = of_a [a > 0] is the gradient of BN(x) from that of a.

    That is the gradient of x for constant statistics. Returns those of beta, sum(D), and of gamma, sum(D x^).
    """
    if compiled:
        of_beta, of_gamma = _compiled(_accumulate_direct)(of_a, a, x, total, norm.scale, norm.mean, norm.inverse)
        return of_beta, of_gamma
    d = torch.ops.aten.threshold_backward(of_a, a, 0)
    needs_direct = not x.is_cuda  # where it comes in another memory format
    direct, of_gamma, of_beta = torch.ops.aten.native_batch_norm_backward(
        as_line(d), as_line(x.contiguous()), norm.gamma, *norm.statistics, norm.mean, norm.inverse, False, norm.eps,
        [needs_direct, True, True],
    )  # fmt: skip
    if needs_direct:
        total.add_(rows_of(direct))
    else:
        total.addcmul_(d, norm.scale)
    return of_beta, of_gamma


def normalize_relu_backward(
    of_a: torch.Tensor, a: torch.Tensor, x: torch.Tensor, norm: Norm, compiled: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, through its statistics too, of gamma and of beta from that of a.

    s (D - sum(D) / M - x^ sum(D x^) / M), with D as in `accumulate_direct`.
    """
    if compiled:
        of_x, of_gamma, of_beta = _compiled(_normalize_relu_backward)(of_a, a, x, norm.scale, norm.mean, norm.inverse)
        return of_x, of_gamma, of_beta
    d = torch.ops.aten.threshold_backward(of_a, a, 0)
    of_x, of_gamma, of_beta = torch.ops.aten.native_batch_norm_backward(
        as_line(d), as_line(x), norm.gamma, None, None, norm.mean, norm.inverse, True, norm.eps, [True, True, True]
    )
    return rows_of(of_x), of_gamma, of_beta


def moments(x: torch.Tensor) -> torch.Tensor:
    """m and v of each column of x, [2, columns]."""
    scratch = x.new_zeros(2, x.shape[1], dtype=exact_dtype(x.dtype))  # torch takes their dtype for the results
    return torch.stack(torch.ops.aten.batch_norm_update_stats(as_line(x.contiguous()), *scratch, 0.0))


def as_line(rows: torch.Tensor) -> torch.Tensor:
    """[M, c] -> an image of one column, [1, c, M, 1], a view with channels last, for which torch has fast kernels."""
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)


def rows_of(images: torch.Tensor) -> torch.Tensor:
    """[n, c, h, w] -> [n h w, c]: a view if channels are last."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def images_of(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[n h w, c] -> [n, c, h, w], with n, h and w of `shape`: a view with channels last."""
    return rows.view(shape[0], *shape[2:], -1).permute(0, 3, 1, 2)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: torch.Tensor) -> Any:
        allow_many_graphs()
        # Sizes of a parameter would be constants of the compiled code, and each grad mode would have its own.
        return _compile(function)(*(tensor.detach() for tensor in tensors))

    return call


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _scale_shift_relu(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.relu(x.to(scale.dtype) * scale + shift).to(x.dtype)


def _accumulate_direct(
    of_a: torch.Tensor,
    a: torch.Tensor,
    x: torch.Tensor,
    total: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    d = torch.where(a > 0, of_a.to(mean.dtype), 0.0)
    total.copy_(total.to(mean.dtype) + d * scale)
    return d.sum(0), (d * ((x.to(mean.dtype) - mean) * inverse)).sum(0)


def _normalize_relu_backward(
    of_a: torch.Tensor,
    a: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d = torch.where(a > 0, of_a.to(mean.dtype), 0.0)
    normalized = (x.to(mean.dtype) - mean) * inverse
    of_beta, of_gamma = d.sum(0), (d * normalized).sum(0)
    of_x = scale * (d - of_beta / len(x) - normalized * (of_gamma / len(x)))
    return of_x.to(x.dtype), of_gamma, of_beta
