"""The optimizer state inside DeepSpeed's ZeRO optimizers, by parameter.

DeepSpeed has no public way to put a state in, and its own checkpoints are tied to a stage and a number of ranks.
All names of its inside that are needed for one of ours stand in this file.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distrain.recipe.optimizers import counts_steps, prime, slots

# What this file relies on, by the class that has it; a test compares it with the installed release.
INSIDES = {
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "single_partition_of_fp32_groups",
        "_lazy_init_hp_params_optimizer_state",
        "override_loss_scale",
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "fp32_partitioned_groups_flat",
        "set_local_hp_param",
        "override_loss_scale",
    ),
}


def parts_of(zero: Any) -> list[torch.Tensor]:
    """The flat fp32 tensors of this rank that stand in for the parameters in the inner optimizer."""
    parts = zero.fp32_partitioned_groups_flat if _is_stage3(zero) else zero.single_partition_of_fp32_groups
    return [part for part in parts if part is not None]


def prime_parts(zero: Any) -> None:
    """Zeros in every slot of the inner optimizer, linked to the parameters they belong to."""
    prime(zero.optimizer, parts_of(zero))
    if not _is_stage3(zero):
        zero._lazy_init_hp_params_optimizer_state()


def read_slots(zero: Any, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """(slot, its whole tensor) of a parameter. Every rank has to call this for the same parameters in turn."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for slot in slots(zero.optimizer):
        yield slot, safe_get_full_optimizer_state(parameter, slot)
    if counts_steps(zero.optimizer):
        yield "step", zero.optimizer.state[parts_of(zero)[0]]["step"]


def write_slot(zero: Any, parameter: nn.Parameter, slot: str, value: torch.Tensor, rank: int, world: int) -> None:
    """Set what `read_slots` reads, from the whole tensor."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if slot == "step":
        for part in parts_of(zero):
            zero.optimizer.state[part]["step"].copy_(value)
    elif _is_stage3(zero):
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(share * world, dtype=torch.float32, device=parts_of(zero)[0].device)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[rank * share : (rank + 1) * share], slot)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parts_of(zero)[0].device), slot)


def _is_stage3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")
