"""Averages of weights, which often classify better than the weights themselves: exponential (EMA), or equal (SWA)."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from distrain.config import EmaConfig

_PREFIX = "ema/"


class EMA:
    """An average of a network's weights and running statistics: an exponential moving one (Polyak and Juditsky 1992),
    or one in which all count alike (Izmailov et al. 2018, SWA).

    `self.network` holds the average; it starts as a copy of `network`.
    """

    def __init__(self, network: nn.Module, config: EmaConfig) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._config = config

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor], number: int) -> None:
        """Set average = decay x average + (1 - decay) x weights, by state_dict name; integers are copied. `number`: of
        this update since ema.start_epoch, from 1 on; 0 before it, when the average becomes the weights."""
        decay = self._decay(number)
        means = self.network.state_dict()
        averaged = [name for name, mean in means.items() if mean.is_floating_point()]
        torch._foreach_lerp_([means[name] for name in averaged], [weights[name] for name in averaged], 1 - decay)
        for name in means.keys() - averaged:
            means[name].copy_(weights[name])

    def _decay(self, number: int) -> float:
        if number == 0:
            return 0.0
        if self._config.equal:
            return 1 - 1 / number
        return min(self._config.decay, (1 + number) / (10 + number)) if self._config.warmup else self._config.decay

    def state(self) -> dict[str, torch.Tensor]:
        """The average as ema/NAME."""
        return {_PREFIX + name: tensor for name, tensor in self.network.state_dict().items()}

    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Restore the average from a state."""
        self.network.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items() if name.startswith(_PREFIX)}
        )
