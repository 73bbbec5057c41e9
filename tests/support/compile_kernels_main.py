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

from distrain.kernels import triton_convolutions, triton_products

H100 = GPUTarget("cuda", 90, 32)
GROWTHS = (12, 24, 32, 40, 48)
FLOATS = {"scale", "shift", "mean", "inverse", "partial", "of_weight", "sums", "of_taps", "slope", "offset"}
MAPS = {"x", "weight", "z", "dz", "total", "gradient", "o", "d"}


def compile_kernel(function: Any, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
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
        "kernel": f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}",
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
        found.append(compile_kernel(triton_convolutions._add_statistics, dtype, triton_convolutions.STATISTICS))
        for growth in GROWTHS:
            inner = 4 * growth
            product = {"inner": inner, "precision": "tf32"}
            padded = {"padded": triton.next_power_of_2(inner)}
            convolution = {"growth": growth, "padded": triton_convolutions.padded(growth), "precision": "tf32"}
            for kernel, settings in (
                (triton_products._forward, product | triton_products.FORWARD),
                (triton_products._backward, product | padded | triton_products.BACKWARD),
                (triton_convolutions._forward, convolution | triton_convolutions.FORWARD),
                (triton_convolutions._backward, convolution | triton_convolutions.BACKWARD),
                (triton_convolutions._backward_weight, convolution | triton_convolutions.WEIGHT),
            ):
                found.append(compile_kernel(kernel, dtype, settings))
    print(json.dumps({"triton": str(Path(triton.__file__)), "kernels": found}))


if __name__ == "__main__":
    main()
