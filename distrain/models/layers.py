"""Layers that both families share."""

import torch
from torch import nn


def conv(width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias, padded to keep the spatial size at stride 1."""
    padding = (kernel - 1) // 2
    return nn.Conv2d(width_in, width_out, kernel, stride, padding, groups=groups, bias=False)


def global_avg_pool(x: torch.Tensor) -> torch.Tensor:
    """Average over the spatial dimensions: [n, c, h, w] -> [n, c]."""
    return x.mean(dim=(2, 3))
