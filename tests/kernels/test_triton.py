"""Triton kernels: what they compute, by Triton's interpreter, and how they compile for an H100."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment

SUPPORT = Path(__file__).parents[1] / "support"
MULTIPLYING = {
    *(f"triton_products.{name}" for name in ("_forward", "_backward")),
    *(f"triton_convolutions.{name}" for name in ("_forward", "_backward", "_backward_weight")),
}
ELEMENTWISE = "triton_convolutions._add_statistics"
REGISTERS = 255  # of a thread
SHARED_BYTES = 227 << 10  # of a block on an H100


@pytest.fixture(scope="module")
def found() -> dict:
    """What support/interpreted_main.py has found."""
    program = [sys.executable, "-m", "support.interpreted_main"]
    variables = {**environment(), "TRITON_INTERPRET": "1"}
    process = subprocess.run(program, capture_output=True, text=True, env=variables, timeout=600, cwd=SUPPORT.parent)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float32", 2**-24), ("torch.float16", 2**-11)])
def test_products_equal_those_in_fp64_up_to_rounding(found, dtype, rounding):
    """What is stored in the dtype of the maps is rounded once to it; sums are of at most 300 terms in fp32."""
    sums = 300 * 2**-24
    for case in found[dtype]["products"]:
        assert case["z"] <= rounding + sums, case
        assert case["maps"] <= 2 * rounding + sums, case
        assert max(case[name] for name in ("moments of z", "weight", "beta", "gamma")) <= sums, case
        assert case["other columns are left alone"], case


@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float32", 2**-24), ("torch.float16", 2**-11)])
def test_convolutions_equal_those_in_fp64_up_to_rounding(found, dtype, rounding):
    """What is stored, and y, are rounded once, D before it is summed; sums are of at most 9 x 144 terms in fp32."""
    sums = 1296 * 2**-24
    for case in found[dtype]["convolutions"]:
        assert case["moments of o"] <= sums, case
        assert max(case[name] for name in ("o", "weight", "beta", "gamma", "z")) <= 2 * rounding + sums, case
        assert case["strides of the weight"], case


def test_the_variance_is_exact_far_from_zero(found):
    """Where E[x^2] - E[x]^2 has no digit left."""
    assert found["moments"] <= 1e-3


@pytest.mark.parametrize(("recomputation", "forward_calls"), [("kept", 5), ("recomputed", 10)])
@pytest.mark.parametrize(("kind", "convolutions"), [("triton_1x1", 0), ("triton", 5)])
def test_a_network_of_kernels_is_as_exact_as_one_of_torchs_operations(
    found, recomputation, forward_calls, kind, convolutions
):
    errors, calls = found[recomputation]["errors"], found[recomputation]["calls"][kind]
    assert errors[kind] <= 2 * errors["fused"]
    assert calls == {
        "normalize_relu_multiply": forward_calls,
        "normalize_relu_multiply_backward": 5,
        "normalize_relu_convolve": convolutions,
        "normalize_relu_convolve_backward": convolutions,
    }


def test_kernels_are_used_only_for_half_precision_and_aligned_columns(found):
    assert found["products are taken"] == [True, False, False, False]
    assert found["convolutions are taken"] == [True, False, False, False, False]


def compiled(triton: Path | None) -> list[dict]:
    """What support/compile_kernels_main.py has found with the installed Triton, or with that in a folder."""
    variables = environment()
    if triton:
        variables["PYTHONPATH"] = os.pathsep.join([str(triton), variables.get("PYTHONPATH", "")])
    program = [sys.executable, str(SUPPORT / "compile_kernels_main.py")]
    process = subprocess.run(program, capture_output=True, text=True, env=variables, timeout=800)
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    if triton:
        assert found["triton"].startswith(str(triton))
    return found["kernels"]


OLDER = os.environ.get("DISTRAIN_OLDER_TRITON", "")  # a folder with the release that PyTorch 2.11 brings, 3.6


@pytest.mark.parametrize(
    "triton",
    [
        "",
        pytest.param(OLDER, marks=pytest.mark.skipif(not OLDER, reason="DISTRAIN_OLDER_TRITON names no Triton 3.6")),
    ],
    ids=["installed", "older"],
)
def test_every_kernel_compiles_for_an_h100_without_spills_and_with_tensor_cores(triton):
    kernels = compiled(Path(triton) if triton else None)
    assert {(one["kernel"], one["dtype"]) for one in kernels} == {
        (kernel, dtype) for kernel in (*MULTIPLYING, ELEMENTWISE) for dtype in ("bf16", "fp16")
    }
    for one in kernels:
        assert one["spills"] == 0, one
        assert one["registers"] <= REGISTERS, one
        assert one["shared_bytes"] <= SHARED_BYTES, one
        assert "ld.global.b16" not in one["instructions"], one["kernel"]  # of maps: 16 bytes at once
        if one["kernel"] in MULTIPLYING:
            assert re.search(r"wgmma\.mma_async", one["instructions"]), one["kernel"]
