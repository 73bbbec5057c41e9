"""Runs Triton kernels under the interpreter, beside fp64: `python -m support.interpreted_main`, TRITON_INTERPRET=1.

Writes JSON: for each case its errors, relative to the largest value. Memory is filled with NaN before it is written.
The interpreter's bf16 is wrong (Triton 3.6 to 3.8), so that only fp32 and fp16 are computed.
"""

import copy
import json
from typing import Any

import torch

from distrain.kernels import products, triton_products
from distrain.kernels.normalization import Norm, normalize_relu
from distrain.models import build, set_recomputation
from distrain.models.fusion import set_fused
from support.comparing import gradients_of

# Rows, columns, columns of the buffer, width of z: whole tiles and parts of them.
SHAPES = ((128, 64, 64, 64), (200, 40, 64, 48), (129, 72, 128, 128), (64, 8, 16, 16), (300, 136, 160, 192))


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


def moments_far_from_zero() -> float:
    """The error of the variance where the mean is 1000 times the deviation."""
    x = torch.randn(1000, 16)
    norm = Norm(torch.stack((torch.zeros(16), torch.ones(16) - 1e-5)), torch.ones(16), torch.full((16,), 1000.0), 1e-5)
    z, of_z = triton_products.normalize_relu_multiply(x, norm, torch.eye(16))
    return relative(of_z[1], z.double().var(0, unbiased=False))


def network_of(recomputation: str) -> dict[str, float]:
    """A network in fp16 with and without the kernels: the error of all gradients against fp64, and their number of
    calls."""
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
    calls: list[str] = []
    for name in ("normalize_relu_multiply", "normalize_relu_multiply_backward"):
        original = getattr(triton_products, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        setattr(triton_products, name, counted)
    errors = {}
    for name in ("fused", "triton"):
        network = copy.deepcopy(plain)
        set_fused(network, True, uses_triton=name == "triton")
        errors[name] = float((gradients(network, images, half=True) - exact).norm() / exact.norm())
    return {**errors, "forward": calls.count("normalize_relu_multiply"), "all": len(calls)}


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    found: dict[str, Any] = {
        str(dtype): [products_of(dtype, *shape) for shape in SHAPES] for dtype in (torch.float32, torch.float16)
    }
    found["moments"] = moments_far_from_zero()
    torch.use_deterministic_algorithms(False)
    found["kept"], found["recomputed"] = network_of("none"), network_of("full")
    found["taken"] = [
        products.can_use_triton(torch.empty(4, 32, dtype=dtype)[:, :columns], inner)
        for dtype, columns, inner in (
            (torch.bfloat16, 16, 48), (torch.float32, 16, 48), (torch.float16, 12, 48), (torch.float16, 16, 24)
        )
    ]  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
