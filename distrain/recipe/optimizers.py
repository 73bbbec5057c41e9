"""Optimizers: weight decay and learning rate of each parameter, the state kept for each, and a clipped step."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import SGD, AdamW, Optimizer

from distrain.config import OptimizerConfig
from distrain.models.complexity import count_complexity
from distrain.models.freezing import parameters_named
from distrain.recipe.layerwise import LAMB, LARS

_LAYER = re.compile(r"(?:stages|blocks)\.\d+\.\d+|transitions\.\d+|[^.]+")
_MIN_WEIGHT_NORM = 1e-3  # for adaptive clipping: weights of zero could not move
_MIN_GRADIENT_NORM = 1e-6
_RESOLUTION = 1024  # at which every network has an output

_STATE_NAMES: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    LARS: ("momentum_buffer",),
    AdamW: ("exp_avg", "exp_avg_sq"),
    LAMB: ("exp_avg", "exp_avg_sq"),
}


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """Build the configured optimizer over all parameters of `module` that are not frozen."""
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
    """Group the parameters that are not frozen by learning rate and weight decay: matrices (convolutions, classifier)
    have it, vectors (norms, biases) may, and what optimizer.no_decay names has none. Raises UserError as
    `parameters_named`."""
    factors = lr_factors(module, config)
    exempt = parameters_named(module, config.no_decay, "optimizer.no_decay")
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim <= 1, name in exempt, factors[name]].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if not is_exempt and (config.decay_norms or not is_vector) else 0.0,
            "lr_factor": factor,
        }
        for (is_vector, is_exempt, factor), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2])
        )
    ]


def lr_factors(module: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """The learning rate of each parameter by name, as a multiple of the schedule's.

    It falls by `layer_decay` from each layer to the one before it (Bao et al. 2022, BEiT, appendix), where a layer is
    the stem, a block or a transition; that of the classifier is `head_lr_factor`.
    """
    names = [name for name, _ in module.named_parameters()]
    if config.layer_decay == config.head_lr_factor == 1:
        return dict.fromkeys(names, 1.0)
    executed = [_layer_of(name) for name in count_complexity(module, _RESOLUTION)]
    depth = {layer: number for number, layer in enumerate(dict.fromkeys(executed))}
    factors = {layer: config.layer_decay ** (len(depth) - 1 - number) for layer, number in depth.items()}
    factors["head"] = config.head_lr_factor
    return {name: factors[_layer_of(name)] for name in names}


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    assert match is not None
    return match[0]


def init_state(optimizer: Optimizer, parameters: Iterable[torch.Tensor] | None = None) -> None:
    """Set the state of every parameter, or of `parameters` that replace them, to zeros, as before the first step.

    An optimizer creates its state only in its first step, which is too late to save or load one before it.
    """
    for parameter in parameters or [one for group in optimizer.param_groups for one in group["params"]]:
        optimizer.state[parameter] = {name: torch.zeros_like(parameter) for name in state_names(optimizer)}
        if counts_steps(optimizer):
            optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)


def state_names(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the tensors in the shape of a parameter that an optimizer keeps for it."""
    names = _STATE_NAMES[type(optimizer)]
    return () if names == ("momentum_buffer",) and not optimizer.defaults["momentum"] else names


def counts_steps(optimizer: Optimizer) -> bool:
    """Whether an optimizer also keeps a counter `step`, float [], for each parameter."""
    return "exp_avg" in _STATE_NAMES[type(optimizer)]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups, each times its factor."""
    for settings in optimizer.param_groups:
        settings["lr"] = lr * settings["lr_factor"]


def update_clipped(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    scale: torch.Tensor,
    config: OptimizerConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscale the gradients of `parameters`, by name, by `scale`, clip them as configured and take a step.

    Returns the norm of the gradient before clipping, float [], and whether the step was taken, bool []: it is
    skipped if the gradient is not finite. The CPU does not wait for the device.
    """
    set_lr(optimizer, lr)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    norm = get_total_norm(gradients) / scale
    finite, divisor = norm.isfinite(), scale
    if config.clip_norm:
        divisor = scale * (norm / config.clip_norm).clamp(min=1.0)
    elif config.clip_value or config.clip_agc:
        torch._foreach_div_(gradients, scale)
        divisor = torch.ones_like(norm)
        if config.clip_value:
            torch._foreach_clamp_min_(gradients, -config.clip_value)
            torch._foreach_clamp_max_(gradients, config.clip_value)
        else:
            # Not those of the classifier, as in the paper.
            clip_adaptively([one for name, one in parameters.items() if _layer_of(name) != "head"], config.clip_agc)
    # As GradScaler does: on the device, the optimizer divides by grad_scale and skips the step if found_inf is 1.
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm, finite


@torch.no_grad()
def clip_adaptively(parameters: Iterable[nn.Parameter], fraction: float) -> None:
    """Scale the gradient of every output unit, or of a whole vector, down to at most `fraction` of the norm of its
    weights (Brock et al. 2021, NFNets, equation 3)."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        axes = tuple(range(1, parameter.ndim)) or None
        weights = torch.linalg.vector_norm(parameter, dim=axes, keepdim=True).clamp(min=_MIN_WEIGHT_NORM)
        gradient = torch.linalg.vector_norm(parameter.grad, dim=axes, keepdim=True)
        parameter.grad.mul_((fraction * weights / gradient.clamp(min=_MIN_GRADIENT_NORM)).clamp(max=1.0))
