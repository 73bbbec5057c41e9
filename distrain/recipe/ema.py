"""Averages of weights along the run, which often classify better than the weights themselves."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

_PREFIX = "average/"


class EMA:
    """An exponential moving average of a network's weights and running statistics (Polyak and Juditsky 1992).

    `network` computes with the average; it starts as a copy of the one given.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Move towards `weights`, named as in the network's state_dict, by 1 - decay of the way."""
        for name, mean in self.network.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(weights[name], 1 - self._decay)
            else:
                mean.copy_(weights[name])

    def state(self) -> dict[str, torch.Tensor]:
        return {_PREFIX + name: tensor for name, tensor in self.network.state_dict().items()}

    def load(self, saved: Mapping[str, torch.Tensor]) -> None:
        self.network.load_state_dict(
            {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items() if name.startswith(_PREFIX)}
        )
