"""Which kernels compute the parts of a fused operation."""

from typing import NamedTuple


class Kernels(NamedTuple):
    """The kernels to use, where they apply. By default torch's own."""

    compiled_passes: bool = False
    """Whether elementwise passes over maps are compiled."""
    triton_1x1: bool = False
    """Whether 1x1 convolutions of dense layers are those of `triton_products`."""
    triton_3x3: bool = False
    """Whether 3x3 convolutions of dense layers are those of `triton_convolutions`."""


TORCH = Kernels()
KERNELS = {
    "fused": TORCH,
    "triton_1x1": Kernels(triton_1x1=True),
    "triton": Kernels(triton_1x1=True, triton_3x3=True),
}
"""By values of `train.dense_block`."""
