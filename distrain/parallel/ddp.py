"""Data parallelism by torch's DistributedDataParallel: every rank holds the whole state."""

from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distrain.config import Config
from distrain.execution.precision import Autocast, LossScale
from distrain.parallel.flat_gradients import FlatGradients
from distrain.parallel.group import Group
from distrain.parallel.strategy import State, Update, model_state, optimizer_state
from distrain.recipe.optimizers import build_optimizer, init_state, update_clipped

# torch 2.14 renamed the option for the broadcast of buffers before each forward pass.
_BUFFERS_OPTION = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


class DDP:
    """Strategy that runs micro-batches under DistributedDataParallel; ranks may have different numbers of lanes.

    With `flat`, gradients are one tensor instead, exchanged after the last micro-batch, as CUDA graphs need it.
    """

    def __init__(
        self,
        config: Config,
        network: Autocast,
        group: Group,
        micro_batches: int,
        example: torch.Tensor,
        flat: bool,
        saved: State | None,
    ) -> None:
        self.network: nn.Module = network
        self._module = network.network
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._micro_batches = len(group.lanes(micro_batches))
        self._group = group
        # DDP averages over ranks, a step averages over lanes; the ratio also holds if ranks differ in lanes.
        self._loss_weight = (1 if flat else group.world) / micro_batches
        self._config = config.optimizer
        self._optimizer = build_optimizer(self._module, config.optimizer)
        self._scale = LossScale(config.train.precision, group.device)
        self.gradients = FlatGradients(list(self._parameters.values())) if flat else None
        """All gradients, if `flat`."""
        self._ddp: DistributedDataParallel | None = None
        if group.world > 1 and not flat:  # with a single rank it would only copy every gradient
            # LaneStatistics averages running statistics; DDP's broadcast of buffers would overwrite them.
            keep_buffers: dict[str, Any] = {_BUFFERS_OPTION: False}
            self._ddp = DistributedDataParallel(
                self.network, gradient_as_bucket_view=True, bucket_cap_mb=config.parallel.bucket_mb, **keep_buffers
            )
            self._warm_up_buckets(self._ddp, example)
        init_state(self._optimizer)
        if saved is not None:
            self._load(saved)

    def _warm_up_buckets(self, ddp: DistributedDataParallel, images: torch.Tensor) -> None:
        """Run the network on throw-away images, so that the first real step uses the final gradient buckets.

        DDP rebuilds its buckets after the first backward pass, and with three or more ranks the sum of an all-reduce
        depends on an element's offset in its bucket. Without this, the first step of a resumed run would differ
        from the same step of the uninterrupted one.
        """
        buffers = {name: buffer.clone() for name, buffer in self._module.named_buffers()}
        for _ in range(2):  # buckets are rebuilt at the start of the second pass
            ddp(images).sum().backward()
        self._optimizer.zero_grad()
        for name, buffer in self._module.named_buffers():
            buffer.copy_(buffers[name])

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        return nullcontext() if self._ddp is None or number == self._micro_batches - 1 else self._ddp.no_sync()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = (self._ddp or self.network)(images)
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        (loss * (self._loss_weight * self._scale.value)).backward()

    def update(self, lr: float) -> Update:
        if self.gradients is not None:
            self.gradients.sum(self._group)
        update = Update(*update_clipped(self._optimizer, self._parameters, lr, self._scale.value, self._config))
        if self.gradients is None:
            self._optimizer.zero_grad()
        else:
            self.gradients.zero()
        self._scale.update(update.applied)
        return update

    def weights(self) -> State:
        return dict(self._module.state_dict())

    def state(self) -> State:
        tensors = {f"model/{name}": tensor for name, tensor in self.weights().items()}
        for name, parameter in self._parameters.items():
            values = self._optimizer.state[parameter]
            tensors.update({f"optimizer/{name}/{key}": value for key, value in values.items()})
        return tensors | self._scale.state()

    def _load(self, saved: State) -> None:
        self._module.load_state_dict(model_state(saved))
        for name, parameter in self._parameters.items():
            for key, value in optimizer_state(saved, name).items():
                self._optimizer.state[parameter][key].copy_(value)
        self._scale.load(saved)
