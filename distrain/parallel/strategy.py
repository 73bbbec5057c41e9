"""Data parallelism behind one protocol, implemented by DistributedDataParallel and DeepSpeed ZeRO."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import nn

State = dict[str, torch.Tensor]


class Update(NamedTuple):
    """The outcome of a step. Both are tensors on the device, so that nothing has to wait for them."""

    norm: torch.Tensor
    """Norm of the gradient over all parameters, before clipping. float []; not finite if the gradient is not."""
    applied: torch.Tensor
    """Whether the weights were updated: they are not if the gradient is not finite. bool []."""


class Strategy(Protocol):
    """Runs micro-batches and updates the weights. Every rank has one, and all make the same calls."""

    network: nn.Module
    """The network in the run's precision with the current weights. Under ZeRO-3 all ranks must call it together."""

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """The context of this rank's micro-batch `number` of a step, counted from 0."""
        ...

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [n, num_classes] for images [n, 3, h, w]."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate a micro-batch's gradients, given the mean loss of its images."""
        ...

    def update(self, lr: float) -> Update:
        """Take an optimizer step along the mean gradient of all micro-batches of all ranks."""
        ...

    def weights(self) -> State:
        """Parameters and buffers by name, unpartitioned, on every rank."""
        ...

    def state(self) -> State:
        """Weights as model/NAME, optimizer state as optimizer/PARAMETER/NAME, and the loss scale.

        Names and values do not depend on the strategy or the number of ranks. The tensors are valid until the next
        step.
        """
        ...


def model_state(saved: State) -> State:
    """The weights in a state, by their names in the network."""
    return {name.removeprefix("model/"): tensor for name, tensor in saved.items() if name.startswith("model/")}


def optimizer_state(saved: State, parameter: str) -> State:
    """The optimizer state of one parameter in a state."""
    prefix = f"optimizer/{parameter}/"
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
