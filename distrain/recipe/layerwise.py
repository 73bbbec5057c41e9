"""Optimizers that give each layer a learning rate of its own, for large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class _Layerwise(Optimizer):
    """Steps whose length goes by the norm of the weights they change. The slots are there beforehand: see `prime`.

    Reads `grad_scale` and `found_inf` as torch's fused optimizers do: divides gradients by the one and stands still
    if the other is 1.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.found_inf is not None and self.found_inf.item():
            return
        for settings in self.param_groups:
            for parameter in settings["params"]:
                if parameter.grad is not None:
                    gradient = parameter.grad if self.grad_scale is None else parameter.grad / self.grad_scale
                    self.move(parameter, gradient, settings, self.state[parameter])

    def move(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], slots: dict[str, torch.Tensor]
    ) -> None:
        raise NotImplementedError


class LARS(_Layerwise):
    """SGD whose rate in each layer is `trust` x |weights| / (|gradient| + weight_decay x |weights|) times `lr`
    (You, Gitman and Ginsburg 2017, algorithm 1). Vectors, and whatever does not decay, move as in SGD."""

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float, nesterov: bool, trust: float, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "trust": trust, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def move(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], slots: dict[str, torch.Tensor]
    ) -> None:
        decay = settings["weight_decay"]
        change = gradient.add(weights, alpha=decay)
        if weights.ndim > 1:
            size, slope = weights.norm(), gradient.norm()
            rate = settings["trust"] * size / (slope + decay * size)
            change *= torch.where((size > 0) & (slope > 0), rate, 1.0)
        if settings["momentum"]:
            speed = slots["momentum_buffer"].mul_(settings["momentum"]).add_(change)
            change = change.add(speed, alpha=settings["momentum"]) if settings["nesterov"] else speed
        weights.add_(change, alpha=-settings["lr"])


class LAMB(_Layerwise):
    """Adam whose step in each layer is as long as `lr` times the layer's weights (You et al. 2020, algorithm 2).
    Vectors move as in AdamW."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def move(
        self, weights: torch.Tensor, gradient: torch.Tensor, settings: dict[str, Any], slots: dict[str, torch.Tensor]
    ) -> None:
        (beta1, beta2), zeros = settings["betas"], torch.zeros_like
        step = slots.setdefault("step", torch.zeros((), device=weights.device)).add_(1)
        mean = slots.setdefault("exp_avg", zeros(weights)).lerp_(gradient, 1 - beta1)
        square = (
            slots.setdefault("exp_avg_sq", zeros(weights)).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        )
        change = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + settings["eps"])
        change.add_(weights, alpha=settings["weight_decay"])
        if weights.ndim > 1:
            size, length = weights.norm(), change.norm()
            change *= torch.where((size > 0) & (length > 0), size / length, 1.0)
        weights.add_(change, alpha=-settings["lr"])
