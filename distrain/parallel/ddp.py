"""Data parallelism by torch's DistributedDataParallel: every rank holds the whole state."""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distrain.parallel.group import Group

# torch 2.14 renamed the switch of the broadcast of buffers before each forward pass.
_BUFFERS_OPTION = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


class DDP:
    """Runs lanes under DistributedDataParallel, dealt evenly or not."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, group: Group, lanes: int) -> None:
        self.module = module
        self.optimizer = optimizer
        self._mine = len(group.lanes(lanes))
        # DDP averages over ranks, a step averages over lanes; the ratio also holds where ranks differ in lanes.
        self._scale = group.world / lanes
        # Running statistics are LaneStatistics' business, and DDP's broadcast of them would undo it.
        keep_buffers: dict[str, Any] = {_BUFFERS_OPTION: False}
        self._ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, **keep_buffers)
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}

    def settle(self, images: torch.Tensor) -> None:
        """Run the network once on throw-away images, so that the first real step is like all others.

        After its first backward pass DDP orders its gradient buckets anew, and from three ranks on the sum of
        an all-reduce depends on an element's place in its bucket. A restarted run would then differ in its
        first step from the run it continues, which has long been past that.
        """
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        for _ in range(2):  # the buckets are rebuilt at the start of the second
            self._ddp(images).sum().backward()
        self.optimizer.zero_grad()
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])

    def lane(self, number: int) -> AbstractContextManager[None]:
        """The context of this rank's lane `number`, counted from 0: gradients travel with the last one only."""
        return nullcontext() if number == self._mine - 1 else self._ddp.no_sync()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._ddp(images)

    def backward(self, loss: torch.Tensor) -> None:
        """Add a lane's gradients, given the mean loss of its images."""
        (loss * self._scale).backward()

    def update(self, lr: float) -> None:
        """Move the weights against the mean gradient of all lanes."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights, buffers and optimizer slots by name; the tensors themselves, not copies."""
        tensors = {f"model/{name}": tensor for name, tensor in self.module.state_dict().items()}
        for parameter, slots in self.optimizer.state.items():
            tensors.update({f"optimizer/{self._names[parameter]}/{slot}": value for slot, value in slots.items()})
        return tensors

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state that any strategy at any world size has saved."""
        self.module.load_state_dict(
            {name.removeprefix("model/"): tensor for name, tensor in state.items() if name.startswith("model/")}
        )
        for name, parameter in self.module.named_parameters():
            prefix = f"optimizer/{name}/"
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): _place(tensor, parameter)
                for key, tensor in state.items()
                if key.startswith(prefix)
            }


def _place(slot: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A slot shaped like its parameter is laid out like it; counters stay where the optimizer keeps them."""
    return torch.empty_like(parameter).copy_(slot) if slot.shape == parameter.shape else slot
