"""The weights that a run starts from, if model.init names any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from distrain.config import Config
from distrain.learner import build_network
from distrain.masking import mask_secrets
from distrain.models import load_weights
from distrain.parallel.group import Group
from distrain.sources import open_weights


@dataclass
class InitialWeights:
    """Where the initial weights come from, on every rank; the main rank also holds them until they are loaded."""

    source: str
    """model.init, with secrets masked."""
    sha256: str
    summary: str = ""
    """What was loaded and what was not."""
    _state: dict[str, torch.Tensor] = field(default_factory=dict)

    def load_into(self, network: nn.Module, group: Group, info: Callable[[str], None]) -> None:
        """Load the main rank's weights into the network of every rank. All ranks call this."""
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if group.is_main:
                    tensor.copy_(self._state[name])
                group.broadcast_tensor(tensor)
        self._state.clear()
        if group.is_main:
            info(self.summary)


def open_initial_weights(config: Config, classes: Sequence[str]) -> InitialWeights:
    """Read the weights that model.init names and fit them to the run's network and `classes`.

    Raises UserError if they cannot be read or do not fit.
    """
    weights = open_weights(config.model.init, config.model.name)
    network = build_network(config, torch.device("cpu"))
    summary = load_weights(network, weights, classes)
    return InitialWeights(mask_secrets(config.model.init), weights.sha256, summary, dict(network.state_dict()))
