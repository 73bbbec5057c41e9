"""Optimizers, which parameters decay, and the step they take."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD, AdamW, Optimizer

from distrain.config import OptimizerConfig
from distrain.recipe.layerwise import LAMB, LARS

_SLOTS: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    LARS: ("momentum_buffer",),
    AdamW: ("exp_avg", "exp_avg_sq"),
    LAMB: ("exp_avg", "exp_avg_sq"),
}


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of `config.name` over all parameters of `module`."""
    groups = group_parameters(module, config)
    settings: dict[str, Any] = {"lr": torch.finfo(torch.float32).tiny}  # set at every step from the schedule
    if config.name in ("sgd", "lars"):
        settings.update(momentum=config.momentum, nesterov=config.nesterov)
    else:
        settings.update(betas=tuple(config.betas), eps=config.eps)
    if config.name == "sgd":
        return SGD(groups, fused=True, **settings)
    if config.name == "adamw":
        return AdamW(groups, fused=True, **settings)
    if config.name == "lars":
        return LARS(groups, trust=config.trust, **settings)
    return LAMB(groups, **settings)


def group_parameters(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Weights of convolutions and of the classifier decay; vectors (norms, biases) do as configured."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms else 0.0},
    ]


def prime(optimizer: Optimizer, parameters: Iterable[torch.Tensor] | None = None) -> None:
    """Give every parameter (or `parameters`, which stand in for them) the slots it has after no steps: zeros.

    Left to itself an optimizer makes them at its first step, when a state may already have been asked for.
    """
    for parameter in parameters or [one for group in optimizer.param_groups for one in group["params"]]:
        optimizer.state[parameter] = {slot: torch.zeros_like(parameter) for slot in slots(optimizer)}
        if counts_steps(optimizer):
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)


def slots(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimizer keeps for each parameter, shaped like it."""
    names = _SLOTS[type(optimizer)]
    return () if names == ("momentum_buffer",) and not optimizer.defaults["momentum"] else names


def counts_steps(optimizer: Optimizer) -> bool:
    """Whether an optimizer keeps a counter `step` beside the slots of each parameter."""
    return "exp_avg" in _SLOTS[type(optimizer)]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for settings in optimizer.param_groups:
        settings["lr"] = lr


def update_clipped(
    optimizer: Optimizer, parameters: list[nn.Parameter], lr: float, scale: torch.Tensor, clip_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a step along gradients that are `scale` times too large, at most `clip_norm` long (0: any length).

    Returns the norm of the gradient before clipping, float [], and whether a step was taken, bool []: none is
    where the gradient is not finite. The CPU does not wait for the device to know.
    """
    set_lr(optimizer, lr)
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]) / scale
    finite = norm.isfinite()
    excess = (norm / clip_norm).clamp(min=1.0) if clip_norm else torch.ones_like(norm)
    # What GradScaler does: the optimizer divides by the one and stands still if the other is 1, on the device.
    optimizer.grad_scale = scale * excess  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm, finite
