"""The 3x3 of a dense layer with the batch normalization and ReLU before it, in plain PyTorch or by Triton kernels."""

import torch
import torch.nn.functional as F

from distrain.kernels.choice import Kernels
from distrain.kernels.normalization import (
    Norm,
    images_of,
    moments,
    normalize_relu,
    normalize_relu_backward,
    rows_of,
)


def normalize_relu_convolve(
    z: torch.Tensor, norm: Norm, weight: torch.Tensor, shape: torch.Size, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """o, [M, k]: the 3x3 convolution of max(0, BN(z)), which is not kept; and mean and variance of o, [2, k].

    `shape`: [n, any, h, w], the shape of the images.
    """
    if kernels.triton_3x3 and can_use_triton(z, len(weight)):
        from distrain.kernels import triton_convolutions  # pulls in a GPU's compiler

        return triton_convolutions.normalize_relu_convolve(z, norm, weight, shape)
    o = convolve(normalize_relu(z, norm, kernels.compiled_passes), weight, shape)
    return o, moments(o)


def normalize_relu_convolve_backward(
    gradient: torch.Tensor, z: torch.Tensor, norm: Norm, weight: torch.Tensor, shape: torch.Size, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of z, [M, b], through its statistics too, of gamma and beta [b] and of the weight, from that of o,
    [M, k]."""
    if kernels.triton_3x3 and can_use_triton(z, len(weight)):
        from distrain.kernels import triton_convolutions

        return triton_convolutions.normalize_relu_convolve_backward(gradient, z, norm, weight, shape)
    y = normalize_relu(z, norm, kernels.compiled_passes)
    of_y, of_weight = convolve_backward(gradient, y, weight, shape)
    return *normalize_relu_backward(of_y, y, z, norm, kernels.compiled_passes), of_weight


def convolve(y: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The 3x3 of the rows y, [M, k]."""
    return rows_of(F.conv2d(images_of(y, shape), weight, padding=1))


def convolve_backward(
    gradient: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the rows y and of the weight of a 3x3, from that of its rows."""
    of_y, of_weight, _ = torch.ops.aten.convolution_backward(
        images_of(gradient, shape), images_of(y, shape), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [True, True, False],
    )  # fmt: skip
    return rows_of(of_y), of_weight


def can_use_triton(z: torch.Tensor, growth: int) -> bool:
    """Whether the Triton kernels take z, [M, b], and this number of results: half precision, where loads begin at
    multiples of 8 bytes."""
    return (
        z.dtype in (torch.bfloat16, torch.float16)
        and z.is_contiguous()
        and z.shape[1] % 16 == 0
        and growth % 4 == 0
        and growth <= 64
    )
