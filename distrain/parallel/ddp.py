"""Data parallelism by torch's DistributedDataParallel: every rank holds the whole state."""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrain.config import Config
from distrain.execution.precision import Autocast, LossScale
from distrain.parallel.group import Group
from distrain.parallel.strategy import State, Update, take_model, take_slots
from distrain.recipe.optimizers import build_optimizer, prime, update_clipped

# torch 2.14 renamed the switch of the broadcast of buffers before each forward pass.
_BUFFERS_OPTION = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


class DDP:
    """Runs micro-batches under DistributedDataParallel, dealt evenly or not."""

    def __init__(
        self,
        config: Config,
        network: nn.Module,
        group: Group,
        micro_batches: int,
        example: torch.Tensor,
        saved: State | None,
    ) -> None:
        self._plain = network
        self._parameters = list(network.parameters())
        self._mine = len(group.lanes(micro_batches))
        # DDP averages over ranks, a step averages over lanes; the ratio also holds where ranks differ in lanes.
        self._share = group.world / micro_batches
        self._clip_norm = config.optimizer.clip_norm
        self._optimizer = build_optimizer(network, config.optimizer)
        self._scale = LossScale(config.train.precision, group.device)
        self.network: nn.Module = Autocast(network, config.train.precision)
        self._ddp: DistributedDataParallel | None = None
        if group.world > 1:  # alone it would copy every gradient for nothing
            # Running statistics are LaneStatistics' business, and DDP's broadcast of them would undo it.
            keep_buffers: dict[str, Any] = {_BUFFERS_OPTION: False}
            self._ddp = DistributedDataParallel(
                self.network, gradient_as_bucket_view=True, bucket_cap_mb=config.parallel.bucket_mb, **keep_buffers
            )
            self._settle(self._ddp, example)
        prime(self._optimizer)
        if saved is not None:
            self._load(saved)

    def _settle(self, ddp: DistributedDataParallel, images: torch.Tensor) -> None:
        """Run the network on throw-away images, so that the first real step is like all others.

        After its first backward pass DDP orders its gradient buckets anew, and from three ranks on the sum of
        an all-reduce depends on an element's place in its bucket. A restarted run would then differ in its
        first step from the run it continues, which has long been past that.
        """
        buffers = {name: buffer.clone() for name, buffer in self._plain.named_buffers()}
        for _ in range(2):  # the buckets are rebuilt at the start of the second
            ddp(images).sum().backward()
        self._optimizer.zero_grad()
        for name, buffer in self._plain.named_buffers():
            buffer.copy_(buffers[name])

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Gradients travel with the last micro-batch of a step only."""
        return nullcontext() if self._ddp is None or number == self._mine - 1 else self._ddp.no_sync()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = (self._ddp or self.network)(images)
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        (loss * (self._share * self._scale.value)).backward()

    def update(self, lr: float) -> Update:
        update = Update(*update_clipped(self._optimizer, self._parameters, lr, self._scale.value, self._clip_norm))
        self._optimizer.zero_grad()
        self._scale.adapt(update.applied)
        return update

    def weights(self) -> State:
        return dict(self._plain.state_dict())

    def state(self) -> State:
        tensors = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self._plain.named_parameters():
            slots = self._optimizer.state[parameter]
            tensors.update({f"optimizer/{name}/{slot}": value for slot, value in slots.items()})
        return tensors | self._scale.state()

    def _load(self, saved: State) -> None:
        self._plain.load_state_dict(take_model(saved))
        for name, parameter in self._plain.named_parameters():
            for slot, value in take_slots(saved, name).items():
                self._optimizer.state[parameter][slot].copy_(value)
        self._scale.load(saved)
