"""Fitting a training step into the memory of the device."""

import copy
import gc
from collections.abc import Callable

import torch
from torch import nn

from distrain.errors import UserError
from distrain.execution.recomputation import blocks_of, recompute_level, set_level
from distrain.execution.trial import is_out_of_memory
from distrain.parallel.group import Group

TrialStep = Callable[[nn.Module, torch.Tensor], None]
"""Takes a training step on a network with images. Raises what `is_out_of_memory` recognizes."""


def fit_memory(
    network: nn.Module,
    images: torch.Tensor,
    splits: int,
    group: Group,
    trial_step: TrialStep,
    info: Callable[[str], None],
) -> int:
    """Return the number of micro-batches, at least `splits`, to split a lane's batch into so that it fits every rank.

    `images` is a lane's batch. Out of memory, all blocks are recomputed first, which does not change results; then
    the number of splits is doubled, which changes the batch that BatchNorm sees. `trial_step` is called with a copy
    of the network. All ranks call this and return the same. Raises UserError if nothing fits.
    """
    blocks = blocks_of(network)
    while not _fits_all_ranks(network, images[: len(images) // splits], group, trial_step):
        if any(block.recomputation != "full" for block in blocks):
            set_level(blocks, recompute_level("full", blocks))
            info("out of memory: recomputing all blocks, as with train.recompute=full; results do not change")
            continue
        splits *= 2
        if len(images) % splits or len(images) // splits < 2:
            raise UserError(
                f"batch.per_lane={len(images)} does not fit the memory of the device, even with all blocks recomputed, "
                "and cannot be split further: start a new run with a smaller batch.per_lane and more batch.lanes"
            )
        info(f"out of memory: splitting each lane's batch into {splits} micro-batches, which BatchNorm sees separately")
    return splits


def _fits_all_ranks(network: nn.Module, images: torch.Tensor, group: Group, trial_step: TrialStep) -> bool:
    _release_memory(group.device)  # after a rollback, reference cycles may still hold the network before
    fits = True
    try:
        trial_step(copy.deepcopy(network), images)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    _release_memory(group.device)
    return not group.any(not fits)


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
