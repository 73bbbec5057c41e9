"""`python -m distrain bench step`: how fast and how large a training step is."""

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
from rich.table import Table

from distrain import config, models
from distrain.arguments import check_writable
from distrain.bench.rounds import Rate, ratio
from distrain.bench.step import BARE, DDP_ALONE, Job
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError
from distrain.models.complexity import count_complexity, total

_VARIANTS = {
    "strategy": [f"parallel.strategy={name}" for name in ("ddp", "zero0", "zero1", "zero2", "zero3")],
    "format": [f"train.memory_format={name}" for name in ("channels_last", "contiguous")],
    "recompute": [f"train.recompute={name}" for name in ("none", "selective", "full")],
    "compile": ["train.compile=false", "train.compile=true"],
}
NEEDED = ["run.name=bench", "data.train=none", "data.val=none"]  # of which nothing is used

# Dense multiply-adds of half precision, 10^12 per second, doubled; from NVIDIA's data sheets.
_PEAK_TFLOPS = {"V100": 125, "A100": 312, "A10G": 125, "L4": 121, "L40S": 362, "H100": 989, "H200": 989, "B200": 2250}


def configure(commands: Any) -> None:
    step = commands.add_parser(
        "step",
        help="images per second and memory of training steps, next to bare PyTorch",
        description="Train on made-up images, with --ranks processes on this machine: a bare PyTorch loop, DDP alone, "
        "and ours in variants of one configuration, all taking turns. Memory is measured in a process group of its own "
        "for each.",
    )
    step.add_argument("--config", metavar="FILE", help="YAML file of a run")
    step.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it, such as model.name=regnety_4gf")
    step.add_argument("--ranks", type=int, default=1, metavar="N", help="processes, or GPUs (default 1)")
    step.add_argument(
        "--vary",
        default="strategy",
        metavar="WHAT,...",
        help=f"what the variants differ in, of {', '.join(_VARIANTS)} (default strategy)",
    )
    step.add_argument("--steps", type=int, default=10, metavar="N", help="in each round (default 10)")
    step.add_argument("--rounds", type=int, default=5, metavar="N", help="in which all take turns; 0: no speed")
    step.add_argument("--memory", action="store_true", help="measure memory too")
    step.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    step.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    overrides = [*NEEDED, *args.overrides]
    settings = config.load(args.config, overrides)
    models.network_config(settings.model.name, **settings.model.options)
    for name in ("ranks", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.json:
        check_writable(args.json)
    job = Job(args.config, overrides, [BARE, DDP_ALONE, *variants(args.vary)], args.steps, args.rounds, memory=False)
    for name in job.candidates[2:]:
        config.check_ranks(config.load(args.config, [*overrides, name]), args.ranks)

    console = Console(width=None if sys.stdout.isatty() else 100)
    rates: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with console.status("measuring") as status:
        if args.rounds > 0:
            rates = _perform(job, args.ranks)["rates"]
        for name in job.candidates if args.memory else []:
            status.update(f"measuring the memory of {name}")
            sizes[name] = _perform(replace(job, candidates=[name], memory=True), args.ranks)["bytes"]
    console.print(tabulate(settings, args, [Rate(name, tuple(values)) for name, values in rates.items()], sizes))
    if args.json:
        args.json.write_text(json.dumps({"ranks": args.ranks, "rates": rates, "peak_bytes": sizes}, indent=1) + "\n")
    return EXIT_DONE


def variants(vary: str) -> list[str]:
    """The contestants of ours: all values of each setting in `vary`. Raises UserError for one that is not known."""
    found = []
    for name in vary.split(","):
        if name not in _VARIANTS:
            raise UserError(f"--vary {name} is not known: it must be of {', '.join(_VARIANTS)}")
        found += _VARIANTS[name]
    return found


def tabulate(settings: Config, args: argparse.Namespace, rates: list[Rate], sizes: dict[str, int]) -> Table:
    """Everything measured, a row per contestant."""
    utilization = _tflops_per_image(settings) / peak if (peak := _peak_tflops() * args.ranks) else 0.0
    title = f"{settings.model.name}, {settings.batch.size} images a step on {args.ranks} ranks"
    table = Table(title=f"{title}, {args.rounds} rounds of {args.steps} steps")
    table.add_column("", no_wrap=True)
    if rates:
        for heading in ("images/s, median (range)", "of bare", "of DDP alone"):
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
            row += [f"{ratio(rates, name, to):.3f}" for to in (BARE, DDP_ALONE)]
            if utilization:
                row.append(f"{rate.median * utilization:.1%}")
        if sizes:
            row.append(f"{sizes[name] / 1e6:,.0f} MB")
        table.add_row(*row)
    return table


def _perform(job: Job, ranks: int) -> dict[str, Any]:
    """Have it done by processes that torchrun starts. Raises UserError with what they said if they fail."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        variables = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)), **os.environ}
        if job.memory:  # what is freed is given back at once, so that it does not count
            variables |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(
            [*torchrun, "-m", "distrain.bench.step", str(file)], capture_output=True, text=True, env=variables
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise UserError(f"bench step: {', '.join(job.candidates)} did not run; what it said stands above")
        results = json.loads(file.with_suffix(".results").read_text())
        assert isinstance(results, dict)
        return results


def _tflops_per_image(settings: Config) -> float:
    """10^12 floating-point operations of a forward and a backward pass, two for each multiply-add."""
    network = models.build(settings.model.name, settings.model.num_classes, **settings.model.options)
    return 6 * total(count_complexity(network, settings.data.image_size).values()).flops / 1e12


def _peak_tflops() -> float:
    """Of this machine's GPU in half precision; 0 where there is none or it is not known."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    name = torch.cuda.get_device_name()
    return next((float(peak) for key, peak in _PEAK_TFLOPS.items() if key in name), 0.0)
