"""Compare tensors within a tolerance."""

import torch
from torch import nn


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error relative to the largest value; NaN if either tensor contains NaN."""
    value, expected = value.detach(), expected.detach()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def gradients_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every parameter, by name."""
    gradients = {}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients


def differing(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> dict[str, float]:
    """Return the error of every tensor that differs by more than `tolerance`."""
    errors = {name: difference(value, expected[name]) for name, value in values.items()}
    return {name: error for name, error in errors.items() if not error <= tolerance}
