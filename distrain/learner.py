"""Everything that changes from step to step: the network under its strategy, its running statistics, its EMA."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn

from distrain import models
from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.loader import Batch, normalize
from distrain.execution.graphs import Graphed
from distrain.execution.numerics import configure_numerics
from distrain.execution.precision import Autocast
from distrain.execution.prepare import prepare
from distrain.execution.trial import example_images
from distrain.parallel.factory import open_strategy
from distrain.parallel.group import Group
from distrain.parallel.statistics import LaneStatistics, recompute_statistics
from distrain.parallel.strategy import State
from distrain.recipe.distillation import Distillation, Teacher
from distrain.recipe.ema import EMA
from distrain.recipe.losses import loss_name, loss_weights, make_loss
from distrain.rng import Stream, torch_seed


class Learner:
    """What a rank trains: `network` from its weights or from a `saved` state. All ranks create theirs together.

    `loss`: of logits and targets; by default cross-entropy. `teacher`: a classifier to learn from too.
    Raises UserError if network, device and configuration do not fit each other.
    """

    def __init__(
        self,
        config: Config,
        group: Group,
        network: nn.Module,
        saved: State | None,
        info: Callable[[str], None],
        loss: nn.Module | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.config = config
        self._group = group
        models.freeze(network, config.train.freeze)
        self._distillation = None if teacher is None else Distillation(config, teacher, group.device)
        execution = prepare(config, network, group, info)
        self.splits = execution.splits
        lanes = group.lanes(config.batch.lanes)
        self.micro_batches = [(lane, split) for lane in lanes for split in range(self.splits)]
        """This rank's micro-batches of a step, in order: (lane, index of the split within the lane's batch)."""
        self._ema = EMA(network, config.ema) if config.ema.enabled else None

        total = config.batch.lanes * self.splits
        self.statistics = LaneStatistics(network, group, total, metrics=("loss", "top1"))
        self._criterion = loss or make_loss(config.loss, "cross_entropy", None)
        example = example_images(config, group.device, execution.memory_format)[:: self.splits]
        executed = Autocast(network, config.train.precision, execution.memory_format)
        self.strategy = open_strategy(config, executed, group, total, example, saved, flat=execution.graphs)
        self._graphed: Graphed | None = None
        if execution.graphs and group.device.type == "cuda":
            gradients = [one.grad for one in network.parameters() if one.grad is not None]
            self._graphed = Graphed(len(example), [*gradients, *self.statistics.buffers])
        self.eval_model: nn.Module = self.strategy.network
        """The network to validate: the EMA if there is one. All ranks must call it equally often."""
        if self._ema is not None:
            self.eval_model = Autocast(self._ema.network, config.train.precision, execution.memory_format)
            if saved is not None:
                self._ema.load(saved)

    def execute(self, compute: "Compute", batch: Batch) -> tuple[torch.Tensor, ...]:
        """Call `compute` with this learner and a micro-batch, or replay what it has done with an earlier one."""
        if self._graphed is None:
            return compute(self, batch)
        return self._graphed(partial(compute, self), batch)

    def loss(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch, float [], from the labels and from the teacher, if there is one."""
        loss: torch.Tensor = self._criterion(logits, batch.labels)
        return loss if self._distillation is None else self._distillation(loss, logits, batch.images)

    def recompute_statistics(self, batches: Iterable[Batch]) -> None:
        """Set the running statistics of the network and of its EMA to the means over these micro-batches of all lanes.
        All ranks call this."""
        networks = [self.strategy.network] if self._ema is None else [self.strategy.network, self.eval_model]
        mean, std = self.config.data.mean, self.config.data.std
        recompute_statistics(networks, (normalize(batch.images, mean, std) for batch in batches), self._group)

    def update_ema(self, step: int, start: int = 0) -> None:
        """Update the average of weights, if there is one and it is due, with those after `step` updates. `start`: the
        number of updates in ema.start_epoch epochs."""
        every = self.config.ema.every_steps
        if self._ema is not None and step % every == 0:
            self._ema.update(self.strategy.weights(), max(0, step // every - start // every))

    def state(self) -> State:
        """The state by name: Strategy.state and the EMA."""
        return self.strategy.state() | ({} if self._ema is None else self._ema.state())


Compute = Callable[[Learner, Batch], tuple[torch.Tensor, ...]]
"""Computes a micro-batch: forward pass, loss and backward pass."""


def open_learner(
    config: Config,
    group: Group,
    network: nn.Module,
    saved: State | None,
    info: Callable[[str], None],
    index: Index,
    teacher: Teacher | None,
) -> Learner:
    """A learner with the configured loss for the labels of `index`."""
    weights = loss_weights(config.loss, index)
    on_device = None if weights is None else torch.from_numpy(weights).to(group.device)
    loss = make_loss(config.loss, loss_name(config.loss, index), on_device)
    return Learner(config, group, network, saved, info, loss, teacher)


def build_network(config: Config, device: torch.device) -> nn.Module:
    """Build the configured network with its initial weights, which are the same on every rank."""
    configure_numerics(config.train)
    torch.manual_seed(torch_seed(config.run.seed, Stream.INIT))
    return models.build(config.model.name, config.model.num_classes, **config.model.options).to(device)
