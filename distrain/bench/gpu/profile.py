"""Stage `profile`: launches per step, the share of time in which the GPU computes, and its longest kernels."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from distrain.bench.gpu.candidates import TORCHVISION, Step, open_peer, open_variant, peers_of
from distrain.bench.gpu.setup import NEEDS_GPU, Setup
from distrain.bench.rounds import free, synchronize
from distrain.parallel.group import Group

_TOP = 10
_WARM_UP_STEPS = 2
_NAME = 60  # characters of a kernel's name
_RUNTIME_CALL = re.compile(r"cu(da)?[A-Z]\w*(Launch|Memcpy|Memset|Synchronize)|cu(da)?(Launch|Memcpy|Memset)")


def measure_profile(setup: Setup) -> None:
    """Profile steps of networks, ours and torchvision's."""
    with Group() as group:
        if not setup.has_gpu:
            setup.record.skip("launches and kernels; instead, operators of the CPU", NEEDS_GPU)
        for point in setup.scale.profiled:
            openers: dict[str, Callable[[], Step]] = {"distrain": partial(open_variant, setup, point, group)}
            if peers_of(setup, point, (TORCHVISION,)):
                openers[TORCHVISION] = partial(open_peer, setup, point, group, TORCHVISION)
            for name, open_candidate in openers.items():
                with setup.record.attempt(f"{point}, {name}"):
                    found = profile_steps(open_candidate(), setup.scale.steps, group.device)
                    setup.record.add(f"{point}, {name}", found, *_lines(f"{point}, {name}", found))
                free(group.device)


def profile_steps(step: Step, steps: int, device: torch.device) -> dict[str, Any]:
    """Return what a step launches and what the device does in it; on a CPU, operators take the place of kernels."""
    for _ in range(_WARM_UP_STEPS):
        step()
    synchronize(device)
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    events = profiler.events()
    assert events is not None
    if is_gpu:
        work = [event for event in events if str(event.device_type) == "DeviceType.CUDA"]
    else:
        work = [event for event in events if not event.cpu_children]
    # Annotations span what they annotate, such as all kernels of the optimizer.
    work = [event for event in work if not event.is_user_annotation]
    spans = [(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3) for event in work]
    calls = Counter(event.name for event in events if is_gpu and _RUNTIME_CALL.match(event.name))
    per_step = {name: count / steps for name, count in calls.most_common()}
    return {"unit": "kernels" if is_gpu else "operators", "runtime_calls_per_step": per_step, **summarize(spans, steps)}


def summarize(spans: Sequence[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Summarize (name, start, end) of kernels, in milliseconds, over a number of steps."""
    first, last = min(start for _, start, _ in spans), max(end for _, _, end in spans)
    times, counts = Counter[str](), Counter[str]()
    for name, start, end in spans:
        times[name] += end - start  # type: ignore[assignment]
        counts[name] += 1
    total = sum(times.values())
    top = [
        {"name": name[:_NAME], "ms_per_step": time / steps, "per_step": counts[name] / steps, "share": time / total}
        for name, time in times.most_common(_TOP)
    ]
    return {
        "launches_per_step": len(spans) / steps,
        "step_ms": (last - first) / steps,
        "busy_share": _union([span[1:] for span in spans]) / (last - first),
        "top": top,
    }


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals, as kernels of several streams overlap."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _lines(title: str, found: dict[str, Any]) -> list[str]:
    launches, busy = f"{found['launches_per_step']:,.0f} {found['unit']} a step", f"busy {found['busy_share']:.0%}"
    kernels = [f"  {one['share']:4.0%} {one['per_step']:6.1f} x {one['name']}" for one in found["top"][:3]]
    return [f"{title}: {launches}, {busy} of {found['step_ms']:.1f} ms", *kernels]
