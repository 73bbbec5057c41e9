"""The 1x1 of a dense layer with the batch normalization and ReLU before it, in plain PyTorch or by Triton kernels.

On a CPU, rows are taken in groups that remain in its cache from one pass to the next.
"""

import torch

from distrain.kernels.choice import Kernels
from distrain.kernels.normalization import Norm, accumulate_direct, exact_dtype, moments, normalize_relu

_CACHED_BYTES = 4 << 20
"""Of a group of rows."""


def normalize_relu_multiply(
    x: torch.Tensor, norm: Norm, weight: torch.Tensor, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """z = max(0, BN(x)) weight^T, [M, b], without keeping the first factor, and mean and variance of z, [2, b]."""
    if kernels.triton_1x1 and can_use_triton(x, len(weight)):
        from distrain.kernels import triton_products  # pulls in a GPU's compiler

        return triton_products.normalize_relu_multiply(x, norm, weight)
    z = x.new_empty((len(x), len(weight)))
    for rows in _parts(x):
        torch.mm(normalize_relu(x[rows], norm, kernels.compiled_passes), weight.T, out=z[rows])
    return z, moments(z)


def normalize_relu_multiply_backward(
    dz: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    total: torch.Tensor,
    kernels: Kernels,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of weight [b, C], beta and gamma [C] from that of z, [M, b], for constant statistics of x.

    Adds that of x to `total`, [M, C]. x and `total` may be columns of wider buffers.
    """
    if kernels.triton_1x1 and can_use_triton(x, len(weight)):
        from distrain.kernels import triton_products

        return triton_products.normalize_relu_multiply_backward(dz, x, norm, weight, total)
    compiled = kernels.compiled_passes
    of_weight = torch.zeros_like(weight, dtype=exact_dtype(weight.dtype))
    of_beta, of_gamma = torch.zeros_like(norm.mean), torch.zeros_like(norm.mean)
    for rows in _parts(x):
        part = x[rows] if compiled else x[rows].contiguous()
        a = normalize_relu(part, norm, compiled)
        of_weight += dz[rows].T @ a
        beta, gamma = accumulate_direct(dz[rows] @ weight, a, part, norm, total[rows], compiled)
        of_beta += beta
        of_gamma += gamma
    return of_weight, of_beta, of_gamma


def can_use_triton(x: torch.Tensor, inner: int) -> bool:
    """Whether the Triton kernels take these maps, [M, C], columns of a buffer, and this width b of z: half precision,
    where all loads begin at a multiple of 16 bytes."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % 8 == 0
        and x.stride(0) % 8 == 0
        and inner % 16 == 0
        and inner <= 256
    )


def _parts(rows: torch.Tensor) -> list[slice]:
    """Groups of rows that fit the cache; one group on a GPU."""
    count = len(rows)
    if rows.device.type == "cpu":
        count = max(64, _CACHED_BYTES // (rows.shape[1] * rows.element_size()))
    return [slice(start, start + count) for start in range(0, len(rows), count)]
