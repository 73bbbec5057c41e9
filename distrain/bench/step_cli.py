"""`python -m distrain bench step`: speed and memory of training steps."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from distrain import config, models
from distrain.arguments import add_run_arguments, check_writable
from distrain.bench.rounds import Rate, ratio
from distrain.bench.step import BARE, PLAIN_DDP, StepBenchmark
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError, nearest
from distrain.lifetime import tied
from distrain.models.complexity import count_complexity, total

_VARIANTS = {
    "strategy": [f"parallel.strategy={name}" for name in ("ddp", "zero0", "zero1", "zero2", "zero3")],
    "format": [f"train.memory_format={name}" for name in ("channels_last", "contiguous")],
    "dense_block": [f"train.dense_block={name}" for name in ("plain", "fused")],
    "recompute": [f"train.recompute={name}" for name in ("none", "selective", "full")],
    "compile": ["train.compile=false", "train.compile=true"],
}
UNUSED_SETTINGS = ["run.name=bench", "data.train=none", "data.val=none"]  # required by the configuration

# Dense half-precision TFLOPS, two operations per multiply-add, from NVIDIA's data sheets.
_PEAK_TFLOPS = {"V100": 125, "A100": 312, "A10G": 125, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250}


def add_command(commands: Any) -> None:
    """Add `step` to the commands of `bench`."""
    step = commands.add_parser(
        "step",
        help="measure images per second and memory of training steps, compared with bare PyTorch",
        description="Train on synthetic images with --ranks processes on this machine: a bare PyTorch loop, plain DDP, "
        "and distrain in variants of one configuration, interleaved. Memory is measured in a separate process group "
        "per candidate.",
    )
    add_run_arguments(step)
    step.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, one per GPU (default 1)")
    step.add_argument(
        "--vary",
        default="strategy",
        metavar="WHAT,...",
        help=f"settings to compare: {', '.join(_VARIANTS)} (default strategy)",
    )
    step.add_argument("--steps", type=int, default=10, metavar="N", help="steps per round (default 10)")
    step.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="interleaved rounds (default 5); 0: memory only"
    )
    step.add_argument("--memory", action="store_true", help="also measure peak memory")
    step.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    step.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and return the exit code. Raises UserError for invalid arguments."""
    overrides = [*UNUSED_SETTINGS, *args.overrides]
    settings = config.load(args.config, overrides)
    models.network_config(settings.model.name, **settings.model.options)
    for name in ("ranks", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.json:
        check_writable(args.json)
    candidates = [BARE, PLAIN_DDP, *variants(args.vary)]
    benchmark = StepBenchmark(args.config, overrides, candidates, args.steps, args.rounds, memory=False)
    for name in candidates[2:]:
        config.check_ranks(config.load(args.config, [*overrides, name]), args.ranks)

    console = Console(width=None if sys.stdout.isatty() else 100)
    rates: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with console.status("measuring") as status:
        if args.rounds > 0:
            rates = _launch(benchmark, args.ranks)["rates"]
        for name in candidates if args.memory else []:
            status.update(f"measuring the memory of {name}")
            sizes[name] = _launch(replace(benchmark, candidates=[name], memory=True), args.ranks)["bytes"]
    console.print(tabulate(settings, args, [Rate(name, tuple(values)) for name, values in rates.items()], sizes))
    if args.json:
        args.json.write_text(json.dumps({"ranks": args.ranks, "rates": rates, "peak_bytes": sizes}, indent=1) + "\n")
    return EXIT_DONE


def variants(vary: str) -> list[str]:
    """Return all values of each setting in `vary`, a comma-separated list. Raises UserError for an unknown setting."""
    found = []
    for name in vary.split(","):
        if name not in _VARIANTS:
            raise UserError(f"--vary {name} is not known: {nearest(name, _VARIANTS)}")
        found += _VARIANTS[name]
    return found


def tabulate(settings: Config, args: argparse.Namespace, rates: list[Rate], sizes: dict[str, int]) -> Table:
    """Return a table with a row per candidate."""
    utilization = _tflops_per_image(settings) / peak if (peak := _peak_tflops() * args.ranks) else 0.0
    title = f"{settings.model.name}, {settings.batch.size} images per step on {args.ranks} ranks"
    table = Table(title=f"{title}, {args.rounds} rounds of {args.steps} steps")
    table.add_column("", no_wrap=True)
    if rates:
        for heading in ("images/s, median (range)", "vs bare", "vs plain DDP"):
            table.add_column(heading, justify="right")
        if utilization:
            table.add_column("MFU", justify="right")
    if sizes:
        table.add_column("peak memory", justify="right")
    by_name = {rate.name: rate for rate in rates}
    for name in by_name or sizes:
        row = [name]
        if rates:
            rate = by_name[name]
            row.append(f"{rate.median:,.1f} ({min(rate.rounds):,.1f}-{max(rate.rounds):,.1f})")
            row += [f"{ratio(rates, name, baseline):.3f}" for baseline in (BARE, PLAIN_DDP)]
            if utilization:
                row.append(f"{rate.median * utilization:.1%}")
        if sizes:
            row.append(decimal(sizes[name]))
        table.add_row(*row)
    return table


def _launch(benchmark: StepBenchmark, ranks: int) -> dict[str, Any]:
    """Run the benchmark under torchrun and return its results. On failure, print its stderr and raise UserError."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "benchmark.json"
        file.write_text(json.dumps(asdict(benchmark)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
        if benchmark.memory:  # freed memory returns to the system at once, so that it does not count
            variables |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        completed = subprocess.run(
            tied([*torchrun, "-m", "distrain.bench.step", str(file)]), capture_output=True, text=True, env=variables
        )
        if completed.returncode:
            print(completed.stderr, file=sys.stderr)
            raise UserError(f"bench step: {', '.join(benchmark.candidates)} failed, see the error above")
        results = json.loads(file.with_suffix(".results").read_text())
        assert isinstance(results, dict)
        return results


def _tflops_per_image(settings: Config) -> float:
    """Return the 10^12 floating-point operations of a forward and backward pass, two per multiply-add."""
    network = models.build(settings.model.name, settings.model.num_classes, **settings.model.options)
    return 6 * total(count_complexity(network, settings.data.image_size).values()).flops / 1e12


def _peak_tflops() -> float:
    """Return the half-precision peak of this machine's GPU; 0 without a GPU or for an unknown one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((float(peak) for key, peak in _PEAK_TFLOPS.items() if key in name), 0.0)
