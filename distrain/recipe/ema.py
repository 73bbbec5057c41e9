"""Exponential moving average (EMA) of weights, which often classifies better than the weights themselves."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

_PREFIX = "ema/"


class EMA:
    """An exponential moving average of a network's weights and running statistics (Polyak and Juditsky 1992).

    `self.network` holds the average; it starts as a copy of `network`.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set average = decay x average + (1 - decay) x weights, by state_dict name; integers are copied."""
        means = self.network.state_dict()
        averaged = [name for name, mean in means.items() if mean.is_floating_point()]
        torch._foreach_lerp_([means[name] for name in averaged], [weights[name] for name in averaged], 1 - self._decay)
        for name in means.keys() - averaged:
            means[name].copy_(weights[name])

    def state(self) -> dict[str, torch.Tensor]:
        """The average as ema/NAME."""
        return {_PREFIX + name: tensor for name, tensor in self.network.state_dict().items()}

    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Restore the average from a state."""
        self.network.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items() if name.startswith(_PREFIX)}
        )
