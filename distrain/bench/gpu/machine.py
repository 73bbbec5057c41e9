"""Stages `versions` and `tests`: the machine, its libraries, its copies between host and GPU; the tests of GPUs."""

import importlib
import os
import platform
import re
import statistics
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from distrain.bench.gpu.setup import NEEDS_GPU, Setup
from distrain.bench.rounds import time_on_gpu

_PACKAGES = ("torchvision", "triton", "timm", "deepspeed", "numpy", "pillow", "nvidia-dali-cuda130")
_OUTCOME = re.compile(r"(\S+::\S.*) (PASSED|FAILED|ERROR|SKIPPED)\b")
_MISSING = re.compile(r"No module named '([\w.]+)'")
_NO_TESTS = 5  # exit code of pytest
_TESTS = Path(__file__).parents[3] / "tests"
_COPIES = 5


def measure_versions(setup: Setup) -> None:
    """Record the versions of what matters for a GPU, the bandwidth of copies, and what deterministic mode demands."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)  # read at the first matrix product
    versions = {name: _version(name) for name in _PACKAGES}
    versions |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    cudnn, nccl = torch.backends.cudnn.version(), None
    if setup.has_gpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    versions |= {"cudnn": str(cudnn) if cudnn else None, "nccl": nccl, "driver": _driver() if setup.has_gpu else None}
    shown = ", ".join(f"{name} {versions[name]}" for name in ("driver", "torch", "cudnn", "nccl", "triton"))
    name = torch.cuda.get_device_name() if setup.has_gpu else platform.machine()
    setup.record.add("versions", versions, f"{name}, {os.cpu_count()} cores: {shown}")
    if not setup.has_gpu:
        setup.record.skip("copies between host and GPU", NEEDS_GPU)
        setup.record.skip("whether CUBLAS_WORKSPACE_CONFIG is needed", NEEDS_GPU)
        return
    setup.record.add("gpu", {"name": name, "bytes": torch.cuda.get_device_properties(0).total_memory})
    rates = measure_copies(setup)
    setup.record.add("copies_gb_per_s", rates, ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
    complaint = deterministic_complaint()
    answer = "needs CUBLAS_WORKSPACE_CONFIG" if complaint else "works without CUBLAS_WORKSPACE_CONFIG"
    setup.record.add("cublas_workspace_config_needed", bool(complaint), f"deterministic bf16 matmul {answer}")


def measure_copies(setup: Setup) -> dict[str, float]:
    """Return the median rates of copies to (h2d) and from the GPU, 10^9 bytes per second."""
    on_gpu = torch.empty(setup.scale.copied_bytes, dtype=torch.uint8, device=setup.device)
    rates = {}
    for name, pinned in (("pageable", False), ("pinned", True)):
        on_host = torch.zeros(setup.scale.copied_bytes, dtype=torch.uint8, pin_memory=pinned)
        for direction, target, source in (("h2d", on_gpu, on_host), ("d2h", on_host, on_gpu)):

            def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> int:
                target.copy_(source, non_blocking=True)
                return source.nbytes

            copy()
            timed = [time_on_gpu(copy) for _ in range(_COPIES)]
            rates[f"{direction} {name}"] = statistics.median(size / seconds for size, seconds in timed) / 1e9
    return rates


def deterministic_complaint() -> str:
    """What PyTorch says to a deterministic bf16 matrix product on the GPU; empty if it computes it."""
    torch.use_deterministic_algorithms(True)
    try:
        matrix = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
        (matrix @ matrix).sum().item()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.use_deterministic_algorithms(False)
    return ""


def run_tests(setup: Setup) -> None:
    """Run the tests marked `gpu`, except those of what is not installed, and record the outcome of each."""
    if not _TESTS.is_dir():
        setup.record.skip("tests", f"{_TESTS} does not exist")
        return
    if not setup.has_gpu:
        setup.record.skip("tests", NEEDS_GPU)
    outcomes: dict[str, str] = {}
    for path in sorted(_TESTS.rglob("test_*.py")):
        if "mark.gpu" in path.read_text():
            _run_file(setup, path, outcomes)
    counts = Counter(outcomes.values())
    setup.record.add("tests", outcomes, ", ".join(f"{count} {word.lower()}" for word, count in counts.items()))
    for name, outcome in outcomes.items():
        if outcome in ("FAILED", "ERROR"):
            setup.record.fail(f"{name} {outcome}")


def _run_file(setup: Setup, path: Path, outcomes: dict[str, str]) -> None:
    """Add the outcomes of the tests in a file to `outcomes`, by name."""
    chosen = "not dali" if find_spec("deepspeed") else "not dali and not zero"
    options = ["-m", "gpu", "-k", chosen, "-v", "-p", "no:cacheprovider", f"--rootdir={_TESTS.parent}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(path)], cwd=_TESTS.parent, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    before, missing = len(outcomes), None
    for line in process.stdout:
        print(line, end="", flush=True)
        missing = _MISSING.search(line) or missing
        if found := _OUTCOME.match(line):
            outcomes[found[1]] = found[2]
            setup.record.add("tests", outcomes)  # a killed stage keeps those that have ended
    if process.wait() in (0, _NO_TESTS) or len(outcomes) > before:
        return
    name = str(path.relative_to(_TESTS.parent))
    if missing:
        setup.record.skip(name, f"{missing[1]} is not installed")
    else:
        setup.record.fail(f"{name}: pytest exited with code {process.returncode}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # as where a package is only on PYTHONPATH
        pass
    if find_spec(package) is None:
        return None
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
