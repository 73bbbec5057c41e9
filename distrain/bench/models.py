"""Benchmark of networks: ours, fused and plain, beside torchvision's and timm's, in speed and memory.

It imports PyTorch, torchvision and, if they are there, timm and matplotlib, and nothing else:
`python -m distrain.bench.models` runs where a machine with a GPU has no more than that.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distrain import models
from distrain.arguments import check_writable, positive
from distrain.bench.network_costs import (
    ceilings,
    count_kernels,
    count_traffic,
    largest_batch,
    plot_bytes_by_depth,
    saved_bytes,
)
from distrain.bench.rounds import free, measure_interleaved, ratio, time_on_gpu, time_on_host
from distrain.errors import EXIT_DONE, EXIT_USER, UserError, nearest
from distrain.kernels.choice import KERNELS, TORCH, Kernels
from distrain.models.densenet import DenseNetConfig
from distrain.models.fusion import set_fused

BASELINE = "torchvision"
PEER_NAMES = {  # the names of our networks in torchvision and in timm
    "densenet121": ("densenet121", "densenet121"),
    "densenet161": ("densenet161", "densenet161"),
    "densenet169": ("densenet169", "densenet169"),
    "densenet201": ("densenet201", "densenet201"),
    "regnety_400mf": ("regnet_y_400mf", "regnety_004"),
    "regnety_16gf": ("regnet_y_16gf", "regnety_160"),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass
class Candidate:
    """A network and how it is executed."""

    build: Callable[[], nn.Module]
    memory_format: str = "channels_last"
    compiled: str = ""
    """The mode of torch.compile for the whole network; empty: not compiled."""
    has_compiled_parts: bool = False
    """Whether anything is compiled, so that operations inside are not seen."""


@dataclass
class Measured:
    """What is known of a candidate; None: not measured."""

    rounds: list[float] = field(default_factory=list)
    """Images per second of each."""
    vs_baseline: float | None = None
    """The median ratio to BASELINE's in the same rounds."""
    saved_bytes: int | None = None
    """What a forward pass saves for the backward pass, per image, without weights."""
    peak_bytes: int | None = None
    """Of a training step on a GPU, without what other candidates hold."""
    largest_batch: int | None = None
    """Images of the largest batch that the GPU's memory holds."""
    operations: int | None = None
    """Operations of a step, or kernels on a GPU."""
    counted_bytes: int | None = None
    """What these operations read and write if none is kept in a cache."""
    flops: int | None = None
    """Of a step, two per multiply-add."""
    error: str = ""


def candidates_of(network: str, compiled: bool) -> dict[str, Candidate]:
    """Ours and the peers that have this network and are installed. `compiled`: also whole networks under torch.compile,
    which takes minutes each."""

    def plain() -> nn.Module:
        return models.build(network)

    def fused(kernels: Kernels) -> nn.Module:
        built = models.build(network)
        set_fused(built, True, kernels)
        return built

    found = {"distrain plain": Candidate(plain)}
    if isinstance(models.network_config(network), DenseNetConfig):
        for kind, kernels in KERNELS.items() if torch.cuda.is_available() else [("fused", TORCH)]:
            found[f"distrain {kind}"] = Candidate(partial(fused, kernels), has_compiled_parts=kernels != TORCH)
            compiled_passes = kernels._replace(compiled_passes=True)
            found[f"distrain {kind}, passes compiled"] = Candidate(
                partial(fused, compiled_passes), has_compiled_parts=True
            )
    theirs, timms = PEER_NAMES.get(network, ("", ""))
    if theirs:
        found |= _of_torchvision(theirs, compiled)
    if timms and find_spec("timm"):
        found["timm"] = Candidate(lambda: _of_timm(timms), "contiguous")
        found["timm channels_last"] = Candidate(lambda: _of_timm(timms))
    if compiled:
        found["distrain plain, compiled"] = Candidate(plain, compiled="default", has_compiled_parts=True)
    return found


def _of_torchvision(name: str, compiled: bool) -> dict[str, Candidate]:
    from torchvision.models import get_model

    def build(**options: Any) -> Callable[[], nn.Module]:
        return lambda: get_model(name, weights=None, **options)

    found = {
        BASELINE: Candidate(build(), "contiguous"),
        f"{BASELINE} channels_last": Candidate(build()),
    }
    if name.startswith("densenet"):
        found[f"{BASELINE} memory_efficient"] = Candidate(build(memory_efficient=True))
    if compiled:
        found[f"{BASELINE} compiled"] = Candidate(build(), compiled="default", has_compiled_parts=True)
        found[f"{BASELINE} max_autotune"] = Candidate(
            build(), compiled="max-autotune-no-cudagraphs", has_compiled_parts=True
        )
    return found


def _of_timm(name: str) -> nn.Module:
    import timm

    built: nn.Module = timm.create_model(name, pretrained=False)
    return built


class Step:
    """A training step of a candidate on noise: forward pass under autocast, cross-entropy, backward pass, SGD."""

    def __init__(self, candidate: Candidate, batch: int, size: int, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.memory_format = _FORMATS[candidate.memory_format]
        self.network: Any = candidate.build().to(device, memory_format=self.memory_format).train()  # type: ignore[call-overload]
        self._dtype = _DTYPES[precision]
        self._optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9, fused=True)
        if candidate.compiled:
            self.network.compile(mode=candidate.compiled)
        self._size, self._device = size, device
        self.set_batch(batch)

    def set_batch(self, batch: int) -> None:
        """Train on batches of so many images."""
        images = torch.randn(batch, 3, self._size, self._size, device=self._device)
        self.images = images.contiguous(memory_format=self.memory_format)
        self._labels = torch.arange(batch, device=self._device) % 1000

    def fits(self, batch: int) -> bool:
        """Whether a batch of so many images fits the memory of the GPU."""
        try:
            self.set_batch(batch)
            self()
            torch.cuda.synchronize()
        except RuntimeError:  # also cuDNN's, which has its own words for too little memory
            return False
        finally:
            free(self._device)
        return True

    def __call__(self) -> int:
        F.cross_entropy(self.forward().float(), self._labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return len(self.images)

    def forward(self) -> torch.Tensor:
        """The logits of the batch."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            logits: torch.Tensor = self.network(self.images)
        return logits


def rounds_of(candidates: Mapping[str, Candidate]) -> list[dict[str, Candidate]]:
    """Which candidates to time together: those that open at once, then each that is compiled as a whole beside
    BASELINE, so that what takes minutes delays nothing else."""
    eager = {name: one for name, one in candidates.items() if not one.compiled}
    baseline = {name: one for name, one in eager.items() if name == BASELINE}
    compiled = [{**baseline, name: one} for name, one in candidates.items() if one.compiled]
    return [eager, *compiled] if eager else compiled


def measure(
    candidates: Mapping[str, Candidate], args: argparse.Namespace, device: torch.device, end: float
) -> dict[str, Measured]:
    """Open the candidates one after the other until `end`, then time those that could be opened alternately."""
    found = {name: Measured() for name in candidates}
    steps: dict[str, Step] = {}
    for name, candidate in candidates.items():
        if time.monotonic() > end:
            found[name].error = "not measured: out of time"
            continue
        try:
            step = Step(candidate, args.batch, args.size, args.precision, device)
            step()
            found[name].saved_bytes = saved_bytes(step.forward, step.network) // args.batch
            if not candidate.has_compiled_parts:
                found[name].operations, found[name].counted_bytes, found[name].flops = count_traffic(step)
            if device.type == "cuda":
                _measure_on_gpu(step, args, found[name])
            steps[name] = step
        except Exception as error:  # whatever a library or its compiler raises: the others are measured all the same
            found[name].error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{name}: {found[name].error or 'opened'}", flush=True)

    def repeat(step: Step) -> Callable[[], int]:
        return lambda: sum(step() for _ in range(args.steps))

    timer = time_on_gpu if device.type == "cuda" else time_on_host
    rates = measure_interleaved({name: repeat(step) for name, step in steps.items()}, args.rounds, timer)
    for rate in rates:
        found[rate.name].rounds = list(rate.rounds)
    if BASELINE in steps:
        for name in steps:
            found[name].vs_baseline = ratio(rates, name, BASELINE)
    return found


def _measure_on_gpu(step: Step, args: argparse.Namespace, found: Measured) -> None:
    """Fill in what only a GPU shows: memory and kernels of a step."""
    found.operations = count_kernels(step)
    held = torch.cuda.memory_allocated()
    own = sum(tensor.nbytes for tensor in step.network.state_dict().values())
    torch.cuda.reset_peak_memory_stats()
    step()
    found.peak_bytes = torch.cuda.max_memory_allocated() - held + own
    if args.largest:
        found.largest_batch = largest_batch(step.fits, args.batch)
        step.set_batch(args.batch)


def select(candidates: Mapping[str, Candidate], only: str) -> dict[str, Candidate]:
    """Those with one of the comma-separated names, or whose names contain it. Raises UserError if none does."""
    words = only.split(",") if only else [""]
    for word in words:
        if not any(word in name for name in candidates):
            raise UserError(f"--only {word}: {nearest(word, list(candidates))}")

    def is_meant(name: str) -> bool:
        return any(word == name if word in candidates else word in name for word in words)

    return {name: one for name, one in candidates.items() if is_meant(name)}


def table_of(found: Mapping[str, Measured], batch: int, roofs: tuple[float, float]) -> list[str]:
    """The lines of a table: a row per candidate."""
    memory = ["saved/image", "peak", "largest"]
    rows = [["", "images/s (range)", f"vs {BASELINE}", *memory, "launches", "moved", "of copy", "of matmul"]]
    for name, one in found.items():
        if one.error:
            rows.append([name, one.error])
            continue
        rate = statistics.median(one.rounds)
        seconds = batch / rate
        rows.append([
            name,
            f"{rate:,.1f} ({min(one.rounds):,.1f}-{max(one.rounds):,.1f})",
            "" if one.vs_baseline is None else f"{one.vs_baseline:.2f}",
            _show(one.saved_bytes, 2**20, "MiB"),
            _show(one.peak_bytes, 1e9, "GB"),
            _show(one.largest_batch, 1, ""),
            _show(one.operations, 1, ""),
            _show(one.counted_bytes, 1e9, "GB"),
            "" if one.counted_bytes is None else f"{one.counted_bytes / seconds / roofs[0]:.0%}",
            "" if one.flops is None else f"{one.flops / seconds / roofs[1]:.0%}",
        ])  # fmt: skip
    full = [row for row in rows if len(row) == len(rows[0])]
    shown = [column for column in range(len(rows[0])) if column == 0 or any(row[column] for row in full[1:])]
    width = {column: max(len(row[column]) for row in full) for column in shown}
    return [
        "  ".join(
            [row[0].ljust(width[0]), *(row[1:] if row not in full else (row[c].rjust(width[c]) for c in shown[1:]))]
        )
        for row in rows
    ]


def _show(value: int | None, unit: float, name: str) -> str:
    if value is None:
        return ""
    return f"{value / unit:,.1f} {name}" if name else f"{value:,}"


_DESCRIPTION = """\
Train a network of ours, fused and plain, and the same of torchvision and timm on noise, alternately, and show
speed, memory and what bounds both. Ratios are medians of ratios within a round."""

_EPILOG = """\
columns: saved, what a forward pass keeps for the backward pass; peak, of a step on a GPU; largest, the batch
that fits it; launches, kernels of a step on a GPU, operations on a CPU; moved, the bytes that these read and
write if none is kept in a cache, which exceeds 100 % of what a copy reaches where much is kept; of matmul,
the share of the flops that a large matrix product reaches.

examples:
  python -m distrain bench models densenet121 --batch 8
  python -m distrain bench models densenet121 --batch 256 --compiled --largest --minutes 6 --json d121.json
  python -m distrain.bench.models densenet121     where only PyTorch and torchvision are installed
"""


def describe(parser: argparse.ArgumentParser) -> None:
    """Add description and arguments to a parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help=f"such as {', '.join(PEER_NAMES)}, or any of `python -m distrain models`")
    parser.add_argument("--batch", type=positive, default=32, metavar="N", help="images per step (default 32)")
    parser.add_argument("--size", type=positive, default=224, metavar="PIXELS", help="of an image (default 224)")
    parser.add_argument("--precision", choices=list(_DTYPES), default="bf16", help="autocast (default bf16)")
    parser.add_argument("--steps", type=positive, default=1, metavar="N", help="steps per round (default 1)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="alternating rounds (default 5)")
    parser.add_argument(
        "--only", default="", metavar="NAME,...", help="only candidates with these names, or whose names contain them"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="also whole networks under torch.compile, which takes minutes each"
    )
    parser.add_argument("--largest", action="store_true", help="on a GPU, also find the largest batch that fits")
    parser.add_argument(
        "--minutes", type=float, default=0.0, metavar="N", help="open no further candidate after so many (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="also plot the memory of dense blocks against their depth"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table. Raises UserError for a network that does not exist or a file that cannot be
    written."""
    models.network_config(args.network)
    for option, file in (("--json", args.json), ("--plot", args.plot)):
        if file:
            check_writable(file, option)
    if args.plot and not find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: install it, or leave --plot out")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    work = f"{args.network}, {args.batch} images of {args.size} pixels, {args.precision}"
    title = f"{work}, {where}, torch {torch.__version__}"
    roofs = ceilings(_DTYPES[args.precision] or torch.float32, device)
    found: dict[str, Measured] = {}
    for together in rounds_of(select(candidates_of(args.network, args.compiled), args.only)):
        for name, one in measure(together, args, device, end).items():
            found.setdefault(name, one)
        free(device)
        if args.json:  # so far: compiling what follows may take longer than this machine is there
            results = {name: asdict(one) for name, one in found.items()}
            content = {"title": title, "ceilings": roofs, "candidates": results}
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    limits = f"a copy moves {roofs[0] / 1e9:,.0f} GB/s, a matrix product reaches {roofs[1] / 1e12:,.2f} TFLOPS"
    print("\n".join([title, limits, *table_of(found, args.batch, roofs)]))
    if args.plot:
        plot_bytes_by_depth(args.plot)
    return EXIT_DONE


def main() -> None:
    """Run as a program of its own."""
    parser = argparse.ArgumentParser(prog="python -m distrain.bench.models")
    describe(parser)
    try:
        raise SystemExit(run(parser.parse_args()))
    except UserError as error:
        print(f"distrain: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
