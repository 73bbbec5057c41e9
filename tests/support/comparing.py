"""How far apart tensors are."""

import torch


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the largest value. NaN where either holds one."""
    value, expected = value.detach(), expected.detach()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def differing(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> dict[str, float]:
    """Which tensors differ by more than `tolerance`, and by how much."""
    errors = {name: difference(value, expected[name]) for name, value in values.items()}
    return {name: error for name, error in errors.items() if not error <= tolerance}
