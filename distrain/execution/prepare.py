"""How a network runs on its device: memory format, what is computed again, compilation, micro-batches that fit.

What is measured is measured once in the life of a run and kept, for another choice rounds differently.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrain.config import Config
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.execution.precision import Autocast
from distrain.models import DenseNet
from distrain.models.recomputation import Block, Recomputation
from distrain.parallel.group import Group

_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
_ROUNDS = 5
_FEW = 2  # images that tell how much memory any number of them takes


@dataclass(frozen=True)
class Execution:
    """What was decided for a run."""

    memory_format: torch.memory_format
    """Of the images that the network is given."""
    parts: int
    """Micro-batches that the batch of a lane is cut into, because a whole one does not fit the device's memory."""


def prepare(config: Config, network: nn.Module, group: Group, info: Callable[[str], None]) -> Execution:
    """Make `network` run as configured, and return what the training loop has to know of it.

    Raises UserError where the device cannot do what is asked for.
    """
    decisions = RunDecisions(config.run.folder)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.parallel.batch_norm == "sync":
        _share_batch_statistics(network, group)

    def decide(name: str, measure: Callable[[], Any]) -> Any:
        return group.broadcast(decisions.get(name, measure) if group.is_main else None)

    layout = config.train.memory_format
    if layout == "auto":
        layout = decide("memory_format", partial(_faster_format, config, network, group.device, info))
    network.to(memory_format=_FORMATS[layout])

    blocks = [module for module in network.modules() if isinstance(module, Block)]
    rung = {"none": 0, "selective": len(blocks), "full": 2 * len(blocks)}.get(config.train.recompute)
    if rung is None:
        rung = decide("recompute", partial(_least_recomputation, config, network, group.device, info))
    climb(blocks, rung)

    parts = int(decide("parts", lambda: 1))
    # Elsewhere a process that asks for too much memory is killed, and not told.
    if group.device.type == "cuda" and config.parallel.batch_norm == "lane":
        images = example_images(config, group.device, _FORMATS[layout])
        trial = partial(_attempt, precision=config.train.precision)
        parts = fit_memory(network, images, parts, group, trial, info)
        if group.is_main:
            decisions.set("parts", parts)
    if config.train.compile:
        for region in regions(network):
            region.compile()
    return Execution(_FORMATS[layout], parts)


def example_images(config: Config, device: torch.device, memory_format: torch.memory_format) -> torch.Tensor:
    """A lane's batch as the network gets it, but noise. float32 [per_lane, 3, size, size]."""
    size = config.data.image_size
    images = torch.randn(config.batch.per_lane, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.to(device).contiguous(memory_format=memory_format)


def regions(network: nn.Module) -> list[nn.Module]:
    """The parts of a network to compile each for itself: those that are alike are compiled once. In a DenseNet no two
    layers are alike, so there it is the blocks of layers."""
    if isinstance(network, DenseNet):
        return list(network.blocks)
    return [module for module in network.modules() if isinstance(module, Block)]


def climb(blocks: Sequence[Block], rung: int) -> None:
    """Let `blocks` compute more again with every rung from 0 to twice their number: one more of them, from the first
    on, in mode `selective`, and once all are, in mode `block`. Memory falls with every rung, results do not change."""
    for number, block in enumerate(blocks):
        mode: Recomputation = "none" if number >= rung else "selective"
        block.recomputation = "full" if number + len(blocks) < rung else mode


def count_kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Memory that is kept from the forward pass on `images` for the backward pass, beside the weights."""
    with _Results() as results:
        loss = network(images).sum()
        kept = results.living_bytes()
    assert loss.requires_grad
    return kept


def fit_memory(
    network: nn.Module,
    images: torch.Tensor,
    parts: int,
    group: Group,
    attempt: Callable[[nn.Module, torch.Tensor], None],
    info: Callable[[str], None],
) -> int:
    """Into how many parts, `parts` or more, a lane's batch `images` is to be cut so that every rank has the memory.

    Where it does not fit, blocks are first computed again, which changes no result; then lanes are halved, which
    changes the batch that BatchNorm sees. `attempt` takes a training step on a copy of the network, or raises
    torch.OutOfMemoryError. Raises UserError where nothing helps.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    while not _all_fit(network, images[: len(images) // parts], group, attempt):
        if any(block.recomputation != "full" for block in blocks):
            climb(blocks, 2 * len(blocks))
            info("out of memory: all blocks are computed again, as with train.recompute=full; results do not change")
            continue
        parts *= 2
        if len(images) % parts or len(images) // parts < 2:
            raise UserError(
                f"batch.per_lane={len(images)} does not fit the memory of the device, and cannot be cut any further: "
                "start a new run with a smaller batch.per_lane and more batch.lanes"
            )
        info(f"out of memory: each lane is cut into {parts} parts from now on, and each part normalised for itself")
    return parts


def _all_fit(
    network: nn.Module, images: torch.Tensor, group: Group, attempt: Callable[[nn.Module, torch.Tensor], None]
) -> bool:
    try:
        attempt(copy.deepcopy(network), images)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    if images.device.type == "cuda":
        torch.cuda.empty_cache()
    return not group.any(not fits)


def _attempt(network: nn.Module, images: torch.Tensor, precision: str) -> None:
    Autocast(network, precision)(images).sum().backward()


def _share_batch_statistics(network: nn.Module, group: Group) -> None:
    if group.device.type != "cuda":
        raise UserError("parallel.batch_norm=sync works on GPUs only: set parallel.batch_norm=lane")
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))


def _faster_format(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> str:
    """The memory format in which a forward and backward pass takes less time, of medians over rounds in turn."""
    times: dict[str, list[float]] = {name: [] for name in _FORMATS}
    runs = {}
    for name, memory_format in _FORMATS.items():
        images = example_images(config, device, memory_format)
        trial = copy.deepcopy(network).to(memory_format=memory_format)
        runs[name] = partial(_attempt, trial, images, config.train.precision)
        runs[name]()
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            times[name].append(_time(run, device))
    rates = {name: config.batch.per_lane / statistics.median(taken) for name, taken in times.items()}
    best = max(rates, key=lambda name: rates[name])
    said = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
    info(f"train.memory_format=auto: {best}, of {said}")
    return best


def _time(run: Callable[[], None], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def _least_recomputation(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> int:
    """The lowest rung of `climb` whose activations fit train.activation_gb."""
    trial = Autocast(copy.deepcopy(network), config.train.precision)
    blocks = [module for module in trial.modules() if isinstance(module, Block)]
    images = example_images(config, device, torch.contiguous_format)[:_FEW]

    def needed(rung: int) -> float:
        climb(blocks, rung)
        return count_kept_bytes(trial, images) / len(images) * config.batch.per_lane / 1e9

    low, high = 0, 2 * len(blocks)
    if (least := needed(high)) > config.train.activation_gb:
        raise UserError(
            f"train.activation_gb={config.train.activation_gb:g} is too little: a lane's activations take "
            f"{least:.3g} GB even if every block is computed again; raise it, or lower batch.per_lane (a new run)"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= config.train.activation_gb else (middle + 1, high)
    again = f"{min(low, len(blocks))} of {len(blocks)} blocks"
    whole = f", {max(0, low - len(blocks))} of them whole" if low > len(blocks) else ""
    info(f"train.recompute=auto: {again} are computed again{whole}, for {needed(low):.3g} GB of activations")
    return low


class _Results(TorchDispatchMode):
    """Watches every tensor that comes to be."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def living_bytes(self) -> int:
        """Memory of all of them that something still refers to."""
        return sum(size for storage, size in self._storages.values() if not storage.expired())
