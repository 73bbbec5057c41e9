"""Training steps on made-up images: ours under every strategy, next to a bare PyTorch loop and to DDP alone.

Run by `python -m distrain bench step`, in processes of its own: `python -m distrain.bench.step FILE` under torchrun
reads a Job from FILE and writes FILE.results.
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

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from distrain import config
from distrain.bench.rounds import measure_in_turns
from distrain.config import Config
from distrain.data.loading.loader import Batch, normalize
from distrain.execution.trial import example_images
from distrain.learner import Learner, build_network
from distrain.parallel.group import Group
from distrain.parallel.zero import import_deepspeed
from distrain.train import train_step

BARE = "bare PyTorch loop"
DDP_ALONE = "DDP alone"


@dataclass(frozen=True)
class Job:
    """What to measure in one process group."""

    config: str | None
    overrides: list[str]
    candidates: list[str]
    """BARE, DDP_ALONE, or overrides with spaces between."""
    steps: int
    rounds: int
    memory: bool
    """Measure the memory of the one contestant there is, and not the speed of all of them."""


def perform(job: Job, group: Group) -> dict[str, Any]:
    """{"rates": {contestant: images/s of each round}}, or {"bytes": its peak}; both of all ranks together."""
    before = resident_bytes(job, group.device) if job.memory else 0
    with TemporaryDirectory() as folder:
        runs = {name: open_candidate(job, name, group, folder) for name in job.candidates}
        if job.memory:
            (run,) = runs.values()
            return {"bytes": peak_bytes(run, job.steps, group) - before}

        def work(run: Callable[[], int]) -> Callable[[], int]:
            def several() -> int:
                images = sum(run() for _ in range(job.steps))
                if group.device.type == "cuda":
                    torch.cuda.synchronize()
                group.barrier()
                return images

            return several

        rates = measure_in_turns({name: work(run) for name, run in runs.items()}, job.rounds)
    return {"rates": {rate.name: rate.rounds for rate in rates}}


def open_candidate(job: Job, name: str, group: Group, folder: str) -> Callable[[], int]:
    """A function that takes one step and returns how many images all ranks together took it from."""
    extra = [] if name in (BARE, DDP_ALONE) else name.split()
    settings = config.load(job.config, [*job.overrides, *extra, f"run.dir={folder}"])
    config.check_ranks(settings, group.world)
    if name in (BARE, DDP_ALONE):
        return loop_alone(settings, group, name)
    return loop_of_ours(Learner(settings, group, None, lambda line: None), group.device)


def loop_of_ours(learner: Learner, device: torch.device) -> Callable[[], int]:
    settings = learner.config
    batches = (batch for batch in repeat(synthetic_batch(settings, device)))
    steps = iter(range(1 << 60))

    def run() -> int:
        train_step(learner, next(steps), batches, lr=1e-3)
        return settings.batch.size

    return run


def loop_alone(settings: Config, group: Group, name: str) -> Callable[[], int]:
    """What one would write oneself: forward, loss, backward, step. Without DDP the ranks do not talk."""
    formats = {"contiguous": torch.contiguous_format}
    memory_format = formats.get(settings.train.memory_format, torch.channels_last)
    network: nn.Module = build_network(settings, group.device).to(memory_format=memory_format)
    if settings.optimizer.name == "sgd":
        optimizer: torch.optim.Optimizer = SGD(
            network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-5, fused=True
        )
    else:
        optimizer = AdamW(network.parameters(), lr=1e-3, fused=True)
    if name == DDP_ALONE:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.train.precision)
    lanes = len(group.lanes(settings.batch.lanes))
    batch = synthetic_batch(settings, group.device)

    def exchange(lane: int) -> AbstractContextManager[None]:
        if isinstance(network, DistributedDataParallel) and lane < lanes - 1:
            return network.no_sync()
        return nullcontext()

    def run() -> int:
        for lane in range(lanes):
            images = normalize(batch.images, settings.data.mean, settings.data.std)
            with exchange(lane):
                with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                    logits = network(images.contiguous(memory_format=memory_format))
                (F.cross_entropy(logits.float(), batch.labels) / lanes).backward()
        optimizer.step()
        optimizer.zero_grad()
        return settings.batch.size

    return run


def synthetic_batch(settings: Config, device: torch.device) -> Batch:
    """A lane's batch as a loader gives it."""
    noise = example_images(settings, device, torch.channels_last)
    labels = torch.arange(settings.batch.per_lane, device=device) % settings.model.num_classes
    return Batch((noise * 50 + 128).clamp(0, 255).to(torch.uint8), labels)


def peak_bytes(run: Callable[[], int], steps: int, group: Group) -> int:
    """Most memory that the rank with most of it takes in `steps` steps after the first ones: of the GPU, or else of
    the process."""
    for _ in range(2):
        run()
    reset_peak(group.device)
    for _ in range(steps):
        run()
    return int(group.max(float(peak(group.device))))


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the highest from here on


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def resident_bytes(job: Job, device: torch.device) -> int:
    """What the process takes before it has a network; nothing on a GPU, where that is not counted anyway."""
    if device.type == "cuda":
        return 0
    if any("zero" in name for name in job.candidates):
        import_deepspeed(device)
    return _status("VmRSS")


def _status(name: str) -> int:
    words = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(found[1]) * 1024 for found in words if found[0] == f"{name}:")


def main() -> None:
    path = Path(sys.argv[1])
    job = Job(**json.loads(path.read_text()))
    with Group() as group:
        results = perform(job, group)
        if group.is_main:
            path.with_suffix(".results").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
