"""Candidates of a comparison: distrain in variants, and bare PyTorch loops with networks of torchvision and timm."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from distrain.bench.gpu.setup import Point, Setup
from distrain.bench.models import PEER_NAMES
from distrain.bench.rounds import free, measure_interleaved, time_on_gpu, time_on_host
from distrain.bench.step import bare_candidate, distrain_candidate, peak, reset_peak
from distrain.learner import Learner, build_network
from distrain.parallel.group import Group

TORCHVISION = "torchvision"
TIMM = "timm"
OURS = "distrain"
PEERS = (TORCHVISION, TIMM)

_WARM_UP_STEPS = 2
Step = Callable[[], int]
"""Trains one step and returns its number of images."""


def open_variant(setup: Setup, point: Point, group: Group, *overrides: str) -> Step:
    """Open distrain with these overrides, and those of the command line."""
    settings = setup.settings(point, *overrides)
    title = " ".join((str(point), *overrides))
    network = build_network(settings, group.device)
    learner = Learner(settings, group, network, None, lambda line: setup.record.note(f"{title}: {line}"))
    return distrain_candidate(learner, group.device)


def peers_of(setup: Setup, point: Point, libraries: Sequence[str] = PEERS) -> list[str]:
    """Those of `libraries` that have this network and are installed; notes the others as not measured."""
    found = []
    for library in libraries:
        if point.network not in PEER_NAMES:
            setup.record.skip(f"{library}, {point}", f"it has no {point.network}")
        elif find_spec(library) is None:
            setup.record.skip(f"{library}, {point}", f"{library} is not installed")
        else:
            found.append(library)
    return found


def open_peer(setup: Setup, point: Point, group: Group, library: str) -> Step:
    """Open a bare loop with a library's network: bf16 autocast, channels_last, fused SGD."""
    settings = setup.settings(point)
    return bare_candidate(_build(library, point.network, setup.scale.classes), settings, group)


def _build(library: str, network: str, classes: int) -> nn.Module:
    if library == TORCHVISION:
        from torchvision.models import get_model

        built: nn.Module = get_model(PEER_NAMES[network][0], weights=None, num_classes=classes)
        return built
    import timm

    built = timm.create_model(PEER_NAMES[network][1], pretrained=False, num_classes=classes)
    return built


def compare(setup: Setup, openers: Mapping[str, Callable[[], Step]], device: torch.device) -> dict[str, dict[str, Any]]:
    """Open all candidates and measure them alternately.

    Returns for each: images/s of every round, their median, milliseconds per step, and on a GPU the peak memory of a
    step without what the other candidates hold. A candidate that cannot be opened is noted as an error.
    """
    steps: dict[str, Step] = {}
    held: dict[str, int] = {}
    for name, open_candidate in openers.items():
        before = allocated(device)
        with setup.record.attempt(name):
            step = open_candidate()
            for _ in range(_WARM_UP_STEPS):
                images = step()
            steps[name], held[name] = step, allocated(device) - before
        free(device)
    timer = time_on_gpu if device.type == "cuda" else time_on_host
    work = {name: _repeat(step, setup.scale.steps) for name, step in steps.items()}
    found = {}
    for rate in measure_interleaved(work, setup.scale.rounds, timer):
        found[rate.name] = {
            "images_per_second": rate.median,
            "rounds": rate.rounds,
            "step_ms": 1e3 * images / rate.median,
        }
        if device.type == "cuda":
            reset_peak(device)
            others = allocated(device) - held[rate.name]
            steps[rate.name]()
            found[rate.name]["peak_bytes"] = peak(device) - others
    return found


def add_ratios(found: dict[str, dict[str, Any]], baseline: str) -> None:
    """Add to every candidate the median over the rounds of its rate divided by the baseline's, if that was measured."""
    if baseline in found:
        for measured in found.values():
            pairs = zip(measured["rounds"], found[baseline]["rounds"], strict=True)
            measured[f"vs_{baseline}"] = statistics.median(own / other for own, other in pairs)


def line_of(title: str, measured: Mapping[str, Any], baseline: str) -> str:
    """A candidate's measurements in one line."""
    rounds = measured["rounds"]
    line = f"{title}: {measured['images_per_second']:,.0f} images/s ({min(rounds):,.0f}-{max(rounds):,.0f})"
    if (ratio := measured.get(f"vs_{baseline}")) is not None:
        line += f", {ratio:.2f} x {baseline}"
    return line + (f", {measured['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in measured else "")


def allocated(device: torch.device) -> int:
    """The bytes of all tensors on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _repeat(step: Step, steps: int) -> Step:
    return lambda: sum(step() for _ in range(steps))
