"""Stages on synthetic images: speed, recomputation, memory, waits."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from distrain.bench.gpu.candidates import (
    OURS,
    PEERS,
    TORCHVISION,
    add_ratios,
    compare,
    line_of,
    open_peer,
    open_variant,
    peers_of,
)
from distrain.bench.gpu.setup import FIXED_CHOICES, NEEDS_GPU, Setup
from distrain.bench.rounds import free, synchronize
from distrain.bench.step import distrain_candidate, peak, reset_peak
from distrain.learner import Learner, build_network
from distrain.parallel.group import Group

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
RECOMPUTATIONS = ("none", "selective", "full")
_WARM_UP_STEPS = 2
_WATCHED_STEPS = 5
_FRACTION = 0.6  # of the memory that a step needs
_PACKAGE = Path(__file__).parents[2]  # distrain
_WAIT = "synchronizing CUDA operation"  # in PyTorch's warning


def measure_speed(setup: Setup) -> None:
    """Compare our variants with bare loops of torchvision's and timm's networks, at every point of every pass."""
    with Group() as group:
        if not setup.has_gpu:
            setup.record.skip("peak memory", NEEDS_GPU)
        for number, (variants, points) in enumerate(setup.scale.passes):
            for point in points:
                peers = peers_of(setup, point, PEERS if number == 0 else (TORCHVISION,))
                openers = {name: partial(open_peer, setup, point, group, name) for name in peers}
                openers |= {
                    f"{OURS} {name}".strip(): partial(open_variant, setup, point, group, *name.split())
                    for name in variants
                }
                with setup.record.attempt(str(point)):
                    found = compare(setup, openers, group.device)
                    add_ratios(found, TORCHVISION)
                    lines = [line_of(f"{point}, {name}", one, TORCHVISION) for name, one in found.items()]
                    setup.record.add(f"{point}, pass {number + 1}", found, *lines)
                free(group.device)


def measure_recomputation(setup: Setup) -> None:
    """Compare the modes of recomputation in speed and memory."""
    with Group() as group:
        if not setup.has_gpu:
            setup.record.skip("peak memory", NEEDS_GPU)
        for point in (setup.scale.small, setup.scale.large):
            openers = {
                mode: partial(open_variant, setup, point, group, *FIXED_CHOICES, f"train.recompute={mode}")
                for mode in RECOMPUTATIONS
            }
            with setup.record.attempt(str(point)):
                found = compare(setup, openers, group.device)
                add_ratios(found, RECOMPUTATIONS[0])
                lines = [line_of(f"{point}, {name}", one, RECOMPUTATIONS[0]) for name, one in found.items()]
                setup.record.add(str(point), found, *lines)
            free(group.device)


def measure_memory(setup: Setup) -> None:
    """Check that training fits itself to a GPU with less memory than a step needs, whichever the memory format."""
    point = setup.scale.crowded
    with Group() as group:
        step = open_variant(setup, point, group, *FIXED_CHOICES)
        step()
        if not setup.has_gpu:
            setup.record.skip("recovery from too little memory", NEEDS_GPU)
            return
        reset_peak(group.device)
        step()
        needed = peak(group.device)
        setup.record.add("needed_bytes", needed, f"{point}: a step needs {needed / 1e9:.2f} GB")
        del step
        free(group.device)
        for name in ("channels_last", "auto"):
            with setup.record.attempt(f"train.memory_format={name} in {_FRACTION:.0%} of that"):
                recovered = recover(setup, group, name, int(_FRACTION * needed))
                setup.record.add(
                    name, recovered, f"{name} in {_FRACTION:.0%} of that: {'; '.join(recovered['messages'])}"
                )
            free(group.device)


def recover(setup: Setup, group: Group, memory_format: str, limit: int) -> dict[str, Any]:
    """Train two steps with at most `limit` bytes of the GPU. Returns what distrain reported, and its peak memory."""
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        messages: list[str] = []
        settings = setup.settings(
            setup.scale.crowded, f"train.memory_format={memory_format}", "train.dense_block=plain"
        )
        learner = Learner(settings, group, build_network(settings, group.device), None, messages.append)
        step = distrain_candidate(learner, group.device)
        reset_peak(group.device)
        step(), step()
        synchronize(group.device)
        return {
            "limit_bytes": limit,
            "peak_bytes": peak(group.device),
            "splits": learner.splits,
            "messages": messages,
        }
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure_waits(setup: Setup) -> None:
    """Count, for every strategy, the calls in which a step waits for the GPU, by the line that makes them."""
    with Group() as group:
        if not setup.has_gpu:
            setup.record.skip("waits for the device", NEEDS_GPU)
        for strategy in STRATEGIES:
            if strategy != "ddp" and find_spec("deepspeed") is None:
                setup.record.skip(strategy, "DeepSpeed is not installed")
                continue
            with setup.record.attempt(strategy):
                overrides = (*FIXED_CHOICES, f"parallel.strategy={strategy}", "batch.lanes=2", "train.graphs=off")
                step = open_variant(setup, setup.scale.small, group, *overrides)
                for _ in range(_WARM_UP_STEPS):
                    step()
                with counted_waits(setup.has_gpu) as counts:
                    for _ in range(_WATCHED_STEPS):
                        step()
                per_step = {line: count / _WATCHED_STEPS for line, count in counts.most_common()}
                found = {"steps": _WATCHED_STEPS, "micro_batches": 2, "waits_per_step": per_step}
                total = f"{sum(per_step.values()):g} waits per step of 2 micro-batches"
                lines = [f"{strategy}: {total}", *(f"  {line} {count:g}" for line, count in per_step.items())]
                setup.record.add(strategy, found, *(lines if setup.has_gpu else [f"{strategy}: trained"]))
            free(group.device)


@contextmanager
def counted_waits(has_gpu: bool = True) -> Iterator[Counter[str]]:
    """Count PyTorch's warnings of calls that wait for the GPU, by FILE:LINE of the innermost frame in distrain, other
    than its benchmarks, or DeepSpeed."""
    counts: Counter[str] = Counter()

    def count(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if _WAIT in str(message):
            counts[_place(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        if has_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            if has_gpu:
                torch.cuda.set_sync_debug_mode("default")


def _place(frame: FrameType | None) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE) and not path.is_relative_to(_PACKAGE / "bench"):
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno}"
        if "deepspeed" in path.parts:
            return f"{'/'.join(path.parts[path.parts.index('deepspeed') :])}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
