"""Read and write, per parameter, the optimizer state inside DeepSpeed's ZeRO optimizers.

DeepSpeed has no public way to load a state, and its own checkpoints are tied to a stage and a number of ranks.
Every private name of DeepSpeed that we use stands in this file.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from distrain.recipe.optimizers import counts_steps, init_state, state_names

# The private names this file relies on, by class; a test checks that the installed release has them.
INTERNALS = {
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


def flat_partitions(zero: Any) -> list[torch.Tensor]:
    """This rank's flat fp32 partitions, which replace the parameters in the inner optimizer."""
    partitions = zero.fp32_partitioned_groups_flat if _is_stage3(zero) else zero.single_partition_of_fp32_groups
    return [partition for partition in partitions if partition is not None]


def init_partition_state(zero: Any) -> None:
    """Initialize the inner optimizer's state to zeros and link it to the parameters."""
    init_state(zero.optimizer, flat_partitions(zero))
    if not _is_stage3(zero):
        zero._lazy_init_hp_params_optimizer_state()


def gather(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of parameters that stage 3 partitions and no optimizer owns. All ranks must call this together."""
    from deepspeed.runtime.zero import GatheredParameters

    tensors = {}
    for name, parameter in parameters.items():
        with GatheredParameters([parameter]):
            tensors[name] = parameter.detach().clone()
    return tensors


def read_optimizer_state(zero: Any, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, unpartitioned tensor) for a parameter. All ranks must call this for the same parameters in order."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for name in state_names(zero.optimizer):
        yield name, safe_get_full_optimizer_state(parameter, name)
    if counts_steps(zero.optimizer):
        yield "step", zero.optimizer.state[flat_partitions(zero)[0]]["step"]


def write_optimizer_state(
    zero: Any, parameter: nn.Parameter, name: str, value: torch.Tensor, rank: int, world: int
) -> None:
    """Set what `read_optimizer_state` yields, from the unpartitioned tensor."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    partitions = flat_partitions(zero)
    if name == "step":
        for partition in partitions:
            zero.optimizer.state[partition]["step"].copy_(value)
    elif _is_stage3(zero):
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = torch.zeros(size * world, dtype=torch.float32, device=partitions[0].device)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], name)
    else:
        safe_set_full_optimizer_state(parameter, value.to(partitions[0].device), name)


def _is_stage3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")
