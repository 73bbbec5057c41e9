"""The gradients of all parameters in one tensor."""

from collections.abc import Sequence

import torch
from torch import nn

from distrain.parallel.group import Group


class FlatGradients:
    """Makes the gradient of every parameter a view into one tensor, into which backward passes accumulate in place: it
    is exchanged in one message, and stays where a CUDA graph has found it."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        first = parameters[0]
        self.tensor = torch.zeros(sum(one.numel() for one in parameters), dtype=first.dtype, device=first.device)
        for parameter, part in zip(parameters, self.tensor.split([one.numel() for one in parameters]), strict=True):
            parameter.grad = part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())

    def sum(self, group: Group) -> None:
        """Replace the gradients by their sum over all ranks."""
        if group.world > 1:
            group.sum(self.tensor)

    def zero(self) -> None:
        self.tensor.zero_()
