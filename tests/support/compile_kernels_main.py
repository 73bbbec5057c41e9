"""Compiles the Triton kernels for sm_90, which needs no GPU, and writes what they use as JSON."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distrain.kernels import triton_products as kernels

H100 = GPUTarget("cuda", 90, 32)
WIDTHS = (48, 96, 128, 160, 192)  # of z for k = 12, 24, 32, 40 and 48
FLOATS = {"scale", "shift", "mean", "inverse", "partial", "of_weight", "sums"}
MAPS = {"x", "weight", "z", "dz", "total"}


def compile_kernel(function: Any, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    options = {name: settings[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in settings.items() if name not in options}
    names = function.arg_names
    signature = dict.fromkeys(names, "i32")
    signature |= {name: f"*{dtype}" for name in names if name in MAPS} | {
        name: "*fp32" for name in names if name in FLOATS
    }
    signature |= dict.fromkeys(constants, "constexpr")
    # PyTorch's memory begins at multiples of 16 bytes, which Triton finds out at a call.
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in names if signature[name].startswith("*")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=H100, options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = triton.knobs.nvidia.ptxas.path
        words = [ptxas, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    return {
        "kernel": function.fn.__name__,
        "dtype": dtype,
        "settings": settings,
        "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
        "spills": sum(int(number) for number in re.findall(r"(\d+) bytes spill", report)),
        "shared_bytes": compiled.metadata.shared,
        "instructions": "\n".join(sorted(set(re.findall(r"^\s*(?:@\S+ )?([a-z][\w.:]+)", compiled.asm["ptx"], re.M)))),
    }


def main() -> None:
    found = []
    for dtype in ("bf16", "fp16"):
        for inner in WIDTHS:
            settings = {"inner": inner, "precision": "tf32"}
            found.append(compile_kernel(kernels._forward, dtype, {**settings, **kernels.FORWARD}))
            padded = {"padded": triton.next_power_of_2(inner)}
            found.append(compile_kernel(kernels._backward, dtype, {**settings, **padded, **kernels.BACKWARD}))
    print(json.dumps({"triton": str(Path(triton.__file__)), "kernels": found}))


if __name__ == "__main__":
    main()
