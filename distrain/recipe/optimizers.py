"""Optimizers, and which parameters decay."""

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from distrain.config import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer of `config.name` over all parameters of `module`."""
    return SGD(
        group_parameters(module, config),
        lr=torch.finfo(torch.float32).tiny,  # set at every step from the schedule
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def group_parameters(module: nn.Module, config: OptimizerConfig) -> list[dict[str, object]]:
    """Weights of convolutions and of the classifier decay; vectors (norms, biases) do as configured."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": config.weight_decay if config.decay_norms else 0.0},
    ]
