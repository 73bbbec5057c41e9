"""Triton kernels of 1x1 convolutions: what they compute, by Triton's interpreter, and how they compile for an H100."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment

SUPPORT = Path(__file__).parents[1] / "support"
REGISTERS = 255  # of a thread
SHARED_BYTES = 227 << 10  # of a block on an H100


@pytest.fixture(scope="module")
def found() -> dict:
    """What support/interpreted_main.py has found."""
    program = [sys.executable, "-m", "support.interpreted_main"]
    variables = {**environment(), "TRITON_INTERPRET": "1"}
    process = subprocess.run(program, capture_output=True, text=True, env=variables, timeout=200, cwd=SUPPORT.parent)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(("dtype", "rounding"), [("torch.float32", 2**-24), ("torch.float16", 2**-11)])
def test_products_equal_those_in_fp64_up_to_rounding(found, dtype, rounding):
    """What is stored in the dtype of the maps is rounded once to it; sums are of at most 300 terms in fp32."""
    sums = 300 * 2**-24
    for case in found[dtype]:
        assert case["z"] <= rounding + sums, case
        assert case["maps"] <= 2 * rounding + sums, case
        assert max(case[name] for name in ("moments of z", "weight", "beta", "gamma")) <= sums, case
        assert case["other columns are left alone"], case


def test_the_variance_is_exact_far_from_zero(found):
    """Where E[x^2] - E[x]^2 has no digit left."""
    assert found["moments"] <= 1e-3


@pytest.mark.parametrize(("recomputation", "forward_calls"), [("kept", 5), ("recomputed", 10)])
def test_a_network_of_kernels_is_as_exact_as_one_of_torchs_operations(found, recomputation, forward_calls):
    errors = found[recomputation]
    assert errors["triton"] <= 2 * errors["fused"]
    assert (errors["forward"], errors["all"]) == (forward_calls, forward_calls + 5)


def test_kernels_are_used_only_for_half_precision_and_aligned_columns(found):
    assert found["taken"] == [True, False, False, False]


def compiled(triton: Path | None) -> list[dict]:
    """What support/compile_kernels_main.py has found with the installed Triton, or with that in a folder."""
    variables = environment()
    if triton:
        variables["PYTHONPATH"] = os.pathsep.join([str(triton), variables.get("PYTHONPATH", "")])
    program = [sys.executable, str(SUPPORT / "compile_kernels_main.py")]
    process = subprocess.run(program, capture_output=True, text=True, env=variables, timeout=280)
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
        (kernel, dtype) for kernel in ("_forward", "_backward") for dtype in ("bf16", "fp16")
    }
    for one in kernels:
        assert one["spills"] == 0, one
        assert one["registers"] <= REGISTERS, one
        assert one["shared_bytes"] <= SHARED_BYTES, one
        assert re.search(r"wgmma\.mma_async", one["instructions"]), one["kernel"]
        assert "ld.global.b16" not in one["instructions"], one["kernel"]  # of maps: 16 bytes at once
