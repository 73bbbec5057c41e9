"""Runs Triton kernels under the interpreter, beside fp64: `python -m support.interpreted_main`, TRITON_INTERPRET=1.

Writes JSON: for each case its errors, relative to the largest value. Memory is filled with NaN before it is written.
The interpreter's bf16 is wrong (Triton 3.6 to 3.8), so that only fp32 and fp16 are computed.
"""

import copy
import json
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from distrain.kernels import convolutions, products, triton_convolutions, triton_products
from distrain.kernels.choice import KERNELS
from distrain.kernels.normalization import Norm, normalize_relu
from distrain.models import build, set_recomputation
from distrain.models.fusion import set_fused
from support.comparing import gradients_of

OPERATIONS = {
    triton_products: ("normalize_relu_multiply", "normalize_relu_multiply_backward"),
    triton_convolutions: ("normalize_relu_convolve", "normalize_relu_convolve_backward"),
}
# Rows, columns, columns of the buffer, width of z: whole tiles and parts of them.
SHAPES = ((128, 64, 64, 64), (200, 40, 64, 48), (129, 72, 128, 128), (64, 8, 16, 16), (300, 136, 160, 192))
# Images, their height and width, width of z, maps: rows shorter and longer than a tile, odd sizes, one row, one column,
# one pixel, several blocks of columns.
IMAGES = (
    (2, 7, 5, 80, 12), (1, 9, 16, 32, 32), (3, 4, 4, 64, 16), (1, 1, 70, 16, 4), (2, 3, 130, 16, 40), (5, 1, 1, 16, 4),
    (2, 70, 1, 144, 8),
)  # fmt: skip


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


def products_of(dtype: torch.dtype, rows: int, columns: int, total: int, inner: int) -> dict[str, Any]:
    buffer = (3 * torch.randn(rows, total) + torch.randn(total)).to(dtype)
    gradient, x = torch.randn(rows, total).to(dtype), buffer[:, :columns]
    statistics = torch.stack((x.float().mean(0), x.float().var(0, unbiased=False)))
    norm = Norm(statistics, torch.rand(columns) + 0.5, torch.randn(columns), 1e-5)
    weight = (torch.randn(inner, columns) / columns**0.5).to(dtype)
    dz = torch.randn(rows, inner).to(dtype)
    # What is rounded on the way is rounded in the reference too.
    a = normalize_relu(x, norm, compiled=False).double()
    z, of_z = triton_products.normalize_relu_multiply(x, norm, weight)
    d = (dz.double() @ weight.double()) * (a > 0)
    normalized = (x.double() - norm.mean.double()) * norm.inverse.double()
    expected = gradient.double()
    expected[:, :columns] += d * norm.scale.double()
    before = gradient.clone()
    of_weight, of_beta, of_gamma = triton_products.normalize_relu_multiply_backward(
        dz, x, norm, weight, gradient[:, :columns]
    )
    return {
        "z": relative(z, a @ weight.double().T),
        "moments of z": relative(of_z, torch.stack((z.double().mean(0), z.double().var(0, unbiased=False)))),
        "weight": relative(of_weight, dz.double().T @ a),
        "beta": relative(of_beta, d.sum(0)),
        "gamma": relative(of_gamma, (d * normalized).sum(0)),
        "maps": relative(gradient[:, :columns], expected[:, :columns]),
        "other columns are left alone": torch.equal(gradient[:, columns:], before[:, columns:]),
    }


def convolutions_of(dtype: torch.dtype, count: int, height: int, width: int, inner: int, growth: int) -> dict[str, Any]:
    shape, rows = torch.Size((count, 1, height, width)), count * height * width
    z = (2 * torch.randn(rows, inner) + torch.randn(inner)).to(dtype)
    statistics = torch.stack((z.float().mean(0), z.float().var(0, unbiased=False)))
    norm = Norm(statistics, torch.rand(inner) + 0.5, torch.randn(inner), 1e-5)
    weight = (torch.randn(growth, inner, 3, 3) / (9 * inner) ** 0.5).to(dtype).to(memory_format=torch.channels_last)
    gradient = torch.randn(rows, growth + 4).to(dtype)[:, :growth]
    y = normalize_relu(z, norm, compiled=False)
    exact_y, exact_weight = y.double(), weight.double()
    of_y, of_weight = convolutions.convolve_backward(gradient.double(), exact_y, exact_weight, shape)
    d = of_y * (y > 0)
    normalized = (z.double() - norm.mean.double()) * norm.inverse.double()
    of_beta, of_gamma = d.sum(0), (d * normalized).sum(0)
    of_z = norm.scale.double() * (d - of_beta / rows - normalized * of_gamma / rows)
    o, of_o = triton_convolutions.normalize_relu_convolve(z, norm, weight, shape)
    found = triton_convolutions.normalize_relu_convolve_backward(gradient, z, norm, weight, shape)
    return {
        "o": relative(o, convolutions.convolve(exact_y, exact_weight, shape)),
        "moments of o": relative(of_o, torch.stack((o.double().mean(0), o.double().var(0, unbiased=False)))),
        **{
            name: relative(one, exact)
            for name, one, exact in zip(
                ("z", "gamma", "beta", "weight"), found, (of_z, of_gamma, of_beta, of_weight), strict=True
            )
        },
        "strides of the weight": found[-1].stride() == weight.stride(),
    }


def moments_far_from_zero() -> float:
    """The error of the variance where the mean is 1000 times the deviation."""
    x = torch.randn(1000, 16)
    norm = Norm(torch.stack((torch.zeros(16), torch.ones(16) - 1e-5)), torch.ones(16), torch.full((16,), 1000.0), 1e-5)
    z, of_z = triton_products.normalize_relu_multiply(x, norm, torch.eye(16))
    return relative(of_z[1], z.double().var(0, unbiased=False))


def network_of(recomputation: str) -> dict[str, Any]:
    """A network in fp16 with torch's kernels and with ours: the error of all gradients against fp64, and the calls."""
    torch.manual_seed(0)
    plain = build("densenet", 5, depths=[3, 2], growth_rate=16, stem_width=16).to(memory_format=torch.channels_last)
    set_recomputation(plain, recomputation)
    images = torch.randn(4, 3, 40, 40)

    def gradients(network: torch.nn.Module, images: torch.Tensor, half: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16, enabled=half):
            logits = network(images)
        logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype))
        return torch.cat([gradient.double().flatten() for gradient in gradients_of(network).values()])

    exact = gradients(copy.deepcopy(plain).double(), images.double(), half=False)
    errors, calls = {}, {}
    for kind, kernels in KERNELS.items():
        network = copy.deepcopy(plain)
        set_fused(network, True, kernels)
        with ExitStack() as stack:
            counted = {
                name: stack.enter_context(patch.object(module, name, wraps=getattr(module, name)))
                for module, names in OPERATIONS.items()
                for name in names
            }
            errors[kind] = float((gradients(network, images, half=True) - exact).norm() / exact.norm())
        calls[kind] = {name: one.call_count for name, one in counted.items()}
    return {"errors": errors, "calls": calls}


def main() -> None:
    torch.manual_seed(0)
    for module in OPERATIONS:  # so that each program takes several tiles of rows
        patch.object(module, "PROGRAMS", 6).start()
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    found: dict[str, Any] = {
        str(dtype): {
            "products": [products_of(dtype, *shape) for shape in SHAPES],
            "convolutions": [convolutions_of(dtype, *shape) for shape in IMAGES],
        }
        for dtype in (torch.float32, torch.float16)
    }
    found["moments"] = moments_far_from_zero()
    torch.use_deterministic_algorithms(False)
    found["kept"], found["recomputed"] = network_of("none"), network_of("full")
    found["products are taken"] = [
        products.can_use_triton(torch.empty(4, 32, dtype=dtype)[:, :columns], inner)
        for dtype, columns, inner in (
            (torch.bfloat16, 16, 48), (torch.float32, 16, 48), (torch.float16, 12, 48), (torch.float16, 16, 24)
        )
    ]  # fmt: skip
    found["convolutions are taken"] = [
        convolutions.can_use_triton(torch.empty(4, inner, dtype=dtype), growth)
        for dtype, inner, growth in (
            (torch.bfloat16, 48, 12), (torch.float32, 48, 12), (torch.float16, 24, 12), (torch.float16, 48, 6),
            (torch.float16, 48, 68),
        )
    ]  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
