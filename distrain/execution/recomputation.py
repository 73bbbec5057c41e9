"""Levels of recomputation (activation checkpointing): the higher, the less memory and the more time a step takes."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrain.config import Config
from distrain.errors import UserError
from distrain.execution.precision import Autocast
from distrain.execution.trial import example_images
from distrain.models.recomputation import Block, Recomputation

_TRIAL_IMAGES = 2  # activations grow linearly with the number of images


def blocks_of(network: nn.Module) -> list[Block]:
    """The blocks of a network that can be recomputed, in order."""
    return [module for module in network.modules() if isinstance(module, Block)]


def recompute_level(mode: Recomputation, blocks: Sequence[Block]) -> int:
    """The level at which every block is in `mode`."""
    return {"none": 0, "selective": len(blocks), "full": 2 * len(blocks)}[mode]


def set_level(blocks: Sequence[Block], level: int) -> None:
    """Set the recomputation mode of `blocks` to a level in 0 .. 2 x their number; results do not change.

    At 0 all are in mode `none`. Each level moves one more block, from the first on, to `selective`; once all are,
    to `full`. Kept memory decreases with every level.
    """
    for index, block in enumerate(blocks):
        mode: Recomputation = "none" if index >= level else "selective"
        block.recomputation = "full" if index + len(blocks) < level else mode


def find_least_level(config: Config, network: nn.Module, device: torch.device, info: Callable[[str], None]) -> int:
    """Return the lowest level at which a lane's activations fit train.activation_gb.

    Raises UserError if even the highest does not.
    """
    trial = Autocast(copy.deepcopy(network), config.train.precision, torch.contiguous_format)
    blocks = blocks_of(trial)
    images = example_images(config, device, torch.contiguous_format)[:_TRIAL_IMAGES]

    def needed_gb(level: int) -> float:
        set_level(blocks, level)
        return count_kept_bytes(trial, images) / len(images) * config.batch.per_lane / 1e9

    low, high = 0, 2 * len(blocks)
    if (least := needed_gb(high)) > config.train.activation_gb:
        raise UserError(
            f"train.activation_gb={config.train.activation_gb:g} is too small: a lane's activations take "
            f"{least:.3g} GB even with full recomputation; raise it, or lower batch.per_lane (a new run)"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if needed_gb(middle) <= config.train.activation_gb else (middle + 1, high)
    recomputed = f"{min(low, len(blocks))} of {len(blocks)} blocks"
    fully = f", {low - len(blocks)} of them fully" if low > len(blocks) else ""
    info(f"train.recompute=auto: recomputing {recomputed}{fully}; activations take {needed_gb(low):.3g} GB")
    return low


def count_kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Count the bytes that a forward pass on `images` keeps for the backward pass, without the weights."""
    with _StorageTracker() as created:
        loss = network(images).sum()
        kept = created.live_bytes()
    assert loss.requires_grad
    return kept


class _StorageTracker(TorchDispatchMode):
    """Keeps weak references to the storage of every tensor created in its context."""

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

    def live_bytes(self) -> int:
        """Bytes of all storages that are still referenced."""
        return sum(size for storage, size in self._storages.values() if not storage.expired())
