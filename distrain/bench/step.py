"""Benchmark of training steps on synthetic images: distrain, a bare PyTorch loop and plain DDP.

`python -m distrain bench step` runs it in separate processes: `python -m distrain.bench.step FILE` under torchrun
reads a StepBenchmark from FILE and writes FILE with suffix .results.
"""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from distrain import config
from distrain.bench.rounds import measure_interleaved, synchronize
from distrain.config import Config
from distrain.data.loading.loader import Batch
from distrain.execution.trial import example_images
from distrain.learner import Learner, build_network
from distrain.lifetime import end_with_agent
from distrain.parallel.group import Group
from distrain.parallel.zero import import_deepspeed
from distrain.train import train_step

BARE = "bare PyTorch loop"
PLAIN_DDP = "plain DDP"


@dataclass(frozen=True)
class StepBenchmark:
    """What to measure in one process group."""

    config: str | None
    overrides: list[str]
    candidates: list[str]
    """BARE, PLAIN_DDP, or overrides separated by spaces."""
    steps: int
    """Per round."""
    rounds: int
    memory: bool
    """Measure the peak memory of the only candidate instead of speeds."""


def run_benchmark(benchmark: StepBenchmark, group: Group) -> dict[str, Any]:
    """Return {"rates": {candidate: global images/s of each round}}, or {"bytes": the largest peak of any rank}."""
    before = resident_bytes(benchmark, group.device) if benchmark.memory else 0
    with TemporaryDirectory() as folder:
        runs = {name: open_candidate(benchmark, name, group, folder) for name in benchmark.candidates}
        if benchmark.memory:
            (run,) = runs.values()
            return {"bytes": peak_bytes(run, benchmark.steps, group) - before}

        def work(run: Callable[[], int]) -> Callable[[], int]:
            def run_steps() -> int:
                images = sum(run() for _ in range(benchmark.steps))
                synchronize(group.device)
                group.barrier()
                return images

            return run_steps

        rates = measure_interleaved({name: work(run) for name, run in runs.items()}, benchmark.rounds)
    return {"rates": {rate.name: rate.rounds for rate in rates}}


def open_candidate(benchmark: StepBenchmark, name: str, group: Group, folder: str) -> Callable[[], int]:
    """Return a function that trains one step and returns the global batch size."""
    variant = [] if name in (BARE, PLAIN_DDP) else name.split()
    settings = config.load(benchmark.config, [*benchmark.overrides, *variant, f"run.dir={folder}"])
    config.check_ranks(settings, group.world)
    if name in (BARE, PLAIN_DDP):
        return baseline_candidate(settings, group, name)
    return distrain_candidate(
        Learner(settings, group, build_network(settings, group.device), None, lambda line: None), group.device
    )


def distrain_candidate(learner: Learner, device: torch.device) -> Callable[[], int]:
    """Return a function that trains one step with distrain and returns the global batch size."""
    settings = learner.config
    batches = (batch for batch in repeat(synthetic_batch(settings, device)))
    steps = iter(range(1 << 60))

    def run() -> int:
        train_step(learner, next(steps), batches, lr=1e-3)
        return settings.batch.size

    return run


def baseline_candidate(settings: Config, group: Group, name: str) -> Callable[[], int]:
    """Return a function that trains one step of our network in bare PyTorch (BARE: without reducing gradients) and
    returns the global batch size."""
    formats = {"contiguous": torch.contiguous_format}
    memory_format = formats.get(settings.train.memory_format, torch.channels_last)
    network = build_network(settings, group.device)
    return bare_candidate(network, settings, group, memory_format, reduces_gradients=name == PLAIN_DDP)


def bare_candidate(
    network: nn.Module,
    settings: Config,
    group: Group,
    memory_format: torch.memory_format = torch.channels_last,
    reduces_gradients: bool = False,
) -> Callable[[], int]:
    """Return a function that trains one step of any network in bare PyTorch and returns the global batch size.

    It shares no code with train_step, whose faults it would hide.
    """
    network = network.to(group.device, memory_format=memory_format)  # type: ignore[call-overload]
    if settings.optimizer.name == "sgd":
        optimizer: torch.optim.Optimizer = SGD(
            network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-5, fused=True
        )
    else:
        optimizer = AdamW(network.parameters(), lr=1e-3, fused=True)
    if reduces_gradients:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision)
    lanes = len(group.lanes(settings.batch.lanes))
    batch = synthetic_batch(settings, group.device)
    # Made once: copying them to the device in every step would wait for it.
    mean, std = (
        255 * torch.tensor(values, device=group.device).view(3, 1, 1)
        for values in (settings.data.mean, settings.data.std)
    )

    def gradient_sync(lane: int) -> AbstractContextManager[None]:
        if isinstance(network, DistributedDataParallel) and lane < lanes - 1:
            return network.no_sync()
        return nullcontext()

    def run() -> int:
        for lane in range(lanes):
            images = (batch.images.float() - mean) / std
            with gradient_sync(lane):
                with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                    logits = network(images.contiguous(memory_format=memory_format))
                (F.cross_entropy(logits.float(), batch.labels) / lanes).backward()
        optimizer.step()
        optimizer.zero_grad()
        return settings.batch.size

    return run


def synthetic_batch(settings: Config, device: torch.device) -> Batch:
    """Return a micro-batch as a loader returns it."""
    noise = example_images(settings, device, torch.channels_last)
    labels = torch.arange(settings.batch.per_lane, device=device) % settings.model.num_classes
    return Batch((noise * 50 + 128).clamp(0, 255).to(torch.uint8), labels)


def peak_bytes(run: Callable[[], int], steps: int, group: Group) -> int:
    """Return the largest peak memory of any rank over `steps` steps after two warm-up steps: of the GPU, or of the
    process on a CPU."""
    for _ in range(2):
        run()
    reset_peak(group.device)
    for _ in range(steps):
        run()
    return int(group.max(float(peak(group.device))))


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak(device: torch.device) -> int:
    """Return the peak bytes of the GPU, or of the process on a CPU: VmHWM, which psutil does not report."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    words = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(found[1]) * 1024 for found in words if found[0] == "VmHWM:")


def resident_bytes(benchmark: StepBenchmark, device: torch.device) -> int:
    """Return the memory of the process before the network is built; 0 on a GPU, whose peak excludes it."""
    if device.type == "cuda":
        return 0
    if any("zero" in name for name in benchmark.candidates):
        import_deepspeed(device)
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Run the benchmark of the file named on the command line."""
    path = Path(sys.argv[1])
    benchmark = StepBenchmark(**json.loads(path.read_text()))
    with Group() as group:
        results = run_benchmark(benchmark, group)
        if group.is_main:
            path.with_suffix(".results").write_text(json.dumps(results))


if __name__ == "__main__":
    end_with_agent()
    main()
