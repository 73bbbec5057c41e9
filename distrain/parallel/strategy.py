"""Data parallelism behind one interface: DistributedDataParallel, or DeepSpeed ZeRO in one of its stages."""

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import nn

from distrain.config import Config
from distrain.parallel.group import Group

State = dict[str, torch.Tensor]


class Update(NamedTuple):
    """What came of a step. Both are tensors on the device, so that nobody has to wait for them."""

    norm: torch.Tensor
    """Of the gradient over all parameters, before clipping. float []; not finite where the gradient was not."""
    applied: torch.Tensor
    """Whether the weights moved: they do not where the gradient is not finite. bool []."""


class Strategy(Protocol):
    """Runs micro-batches and moves the weights. Every rank has one, and all call it alike."""

    network: nn.Module
    """The network in the precision of the run, with the weights of now. ZeRO-3 needs all ranks in every call of it."""

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """The context of this rank's micro-batch `number` of a step, counted from 0."""
        ...

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, h, w] to logits [n, num_classes]."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's gradients, given the mean loss of its images."""
        ...

    def update(self, lr: float) -> Update:
        """Move the weights against the mean gradient of all micro-batches of all ranks."""
        ...

    def weights(self) -> State:
        """Parameters and buffers by name, whole, on every rank."""
        ...

    def state(self) -> State:
        """Weights as model/NAME, slots of the optimizer as optimizer/NAME/SLOT, the loss scale: the same names and
        values whichever strategy and number of ranks. The tensors are good until the next step."""
        ...


def open_strategy(
    config: Config, network: nn.Module, group: Group, micro_batches: int, example: torch.Tensor, saved: State | None
) -> Strategy:
    """The configured strategy, going on from a `saved` state of any strategy and number of ranks.

    A step has `micro_batches` over all ranks, each like `example`, images on the device.
    """
    if config.parallel.strategy == "ddp":
        from distrain.parallel.ddp import DDP

        return DDP(config, network, group, micro_batches, example, saved)
    from distrain.parallel.zero import Zero

    return Zero(config, network, group, micro_batches, saved)


def take_model(saved: State) -> State:
    """The weights in a state, under the names that the network has for them."""
    return {name.removeprefix("model/"): tensor for name, tensor in saved.items() if name.startswith("model/")}


def take_slots(saved: State, parameter: str) -> State:
    """The optimizer's slots of one parameter in a state."""
    prefix = f"optimizer/{parameter}/"
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
