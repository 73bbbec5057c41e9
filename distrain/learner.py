"""All that changes from step to step: the network under its strategy, its running statistics, its average."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import CrossEntropyLoss

from distrain import models
from distrain.config import Config
from distrain.execution.precision import Autocast
from distrain.execution.prepare import example_images, prepare
from distrain.parallel.group import Group
from distrain.parallel.statistics import LaneStatistics
from distrain.parallel.strategy import State, open_strategy
from distrain.recipe.ema import EMA
from distrain.rng import Stream, torch_seed


class Learner:
    """What a rank trains, from the beginning or on from a `saved` state. All ranks make theirs together.

    Raises UserError where network, device and configuration do not fit one another.
    """

    def __init__(self, config: Config, group: Group, saved: State | None, info: Callable[[str], None]) -> None:
        self.config = config
        network = build_network(config, group.device)
        execution = prepare(config, network, group, info)
        self.memory_format = execution.memory_format
        self.parts = execution.parts
        self.micro_batches = [(lane, part) for lane in group.lanes(config.batch.lanes) for part in range(self.parts)]
        """This rank's share of a step: (lane, part of its batch)."""
        self._average = EMA(network, config.ema.decay) if config.ema.decay else None

        everywhere = config.batch.lanes * self.parts
        self.statistics = LaneStatistics(network, group, everywhere, reported=2)
        self.criterion = CrossEntropyLoss(label_smoothing=config.loss.label_smoothing)
        example = example_images(config, group.device, self.memory_format)[:: self.parts]
        self.strategy = open_strategy(config, network, group, everywhere, example, saved)
        self.eval_model: nn.Module = self.strategy.network
        """The network whose accuracy counts. Every rank has to call it as often."""
        if self._average is not None:
            self.eval_model = Autocast(self._average.network, config.train.precision)
            if saved is not None:
                self._average.load(saved)

    def update_average(self, step: int) -> None:
        """Let the average of weights, if there is one, take in those after `step` updates, if it is their turn."""
        if self._average is not None and step % self.config.ema.every_steps == 0:
            self._average.update(self.strategy.weights())

    def state(self) -> State:
        """All of it by name; see Strategy.state."""
        return self.strategy.state() | ({} if self._average is None else self._average.state())


def build_network(config: Config, device: torch.device) -> nn.Module:
    """The configured network with its initial weights, the same on every rank."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    torch.manual_seed(torch_seed(config.run.seed, Stream.INIT))
    return models.build(config.model.name, config.model.num_classes, **config.model.options).to(device)
