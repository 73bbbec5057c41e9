"""Optimizers with layer-wise adaptive learning rates, for large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class _Layerwise(Optimizer):
    """Base of optimizers that scale each layer's step by the norm of its weights. State is created by `init_state`.

    Honors `grad_scale` and `found_inf` as torch's fused optimizers do: divides gradients by the former, and skips
    the step if the latter is 1.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for settings in self.param_groups:
            for parameter in settings["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
                    changed = [parameter, *self.state[parameter].values()]
                    before = [] if self.found_inf is None else [tensor.clone() for tensor in changed]
                    self.update_parameter(parameter, gradient, settings, self.state[parameter])
                    if self.found_inf is not None:
                        # Chosen on the device: to ask here whether to take the step would wait for the gradient.
                        for tensor, value in zip(changed, before, strict=True):
                            torch.where(self.found_inf > 0, value, tensor, out=tensor)

    def update_parameter(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> None:
        raise NotImplementedError


class LARS(_Layerwise):
    """SGD with `lr` x `trust` x |weights| / (|gradient| + weight_decay x |weights|) as each layer's learning rate
    (You, Gitman and Ginsburg 2017, algorithm 1). Vectors are updated as in SGD."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, nesterov: bool, trust: float, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "trust": trust, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update_parameter(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> None:
        decay = settings["weight_decay"]
        update = gradient.add(weights, alpha=decay)
        if weights.ndim > 1:
            weight_norm, gradient_norm = weights.norm(), gradient.norm()
            ratio = settings["trust"] * weight_norm / (gradient_norm + decay * weight_norm)
            update *= torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)
        if settings["momentum"]:
            buffer = state["momentum_buffer"].mul_(settings["momentum"]).add_(update)
            update = update.add(buffer, alpha=settings["momentum"]) if settings["nesterov"] else buffer
        weights.add_(update, alpha=-settings["lr"])


class LAMB(_Layerwise):
    """AdamW whose step in each layer has the norm `lr` x |weights| (You et al. 2020, algorithm 2).
    Vectors are updated as in AdamW."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update_parameter(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], state: dict[str, torch.Tensor]
    ) -> None:
        (beta1, beta2), zeros = settings["betas"], torch.zeros_like
        step = state.setdefault("step", torch.zeros((), device=weights.device)).add_(1)
        mean = state.setdefault("exp_avg", zeros(weights)).lerp_(gradient, 1 - beta1)
        square = (
            state.setdefault("exp_avg_sq", zeros(weights)).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        )
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + settings["eps"])
        update.add_(weights, alpha=settings["weight_decay"])
        if weights.ndim > 1:
            weight_norm, update_norm = weights.norm(), update.norm()
            update *= torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        weights.add_(update, alpha=-settings["lr"])
