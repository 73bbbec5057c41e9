"""Detecting divergence: repeated updates without a finite gradient, and loss spikes."""

import statistics
from collections import deque

import torch

from distrain.config import ResilienceConfig
from distrain.errors import Diverged

_HISTORY = 100  # losses whose median a spike is compared with


class DivergenceDetector:
    """Checks every step one step late, so that training does not wait for the device.

    Deterministic: every rank sees the same inputs.
    """

    def __init__(self, config: ResilienceConfig) -> None:
        self._config = config
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._latest: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def observe(self, step: int, loss: torch.Tensor, applied: torch.Tensor) -> None:
        """Observe the loss of `step`, float [], and whether its update was applied, bool [].

        Raises Diverged if the steps before it have diverged.
        """
        before, self._latest = self._latest, (step, loss, applied)
        if before is not None:
            self._check(*before)

    def _check(self, step: int, loss: torch.Tensor, applied: torch.Tensor) -> None:
        self._skipped = 0 if applied else self._skipped + 1
        if self._config.bad_steps and self._skipped >= self._config.bad_steps:
            raise Diverged(step, f"{self._skipped} updates in a row had no finite gradient,")
        value = float(loss)
        factor = self._config.spike
        if factor and len(self._losses) == _HISTORY and value > factor * statistics.median(self._losses):
            raise Diverged(step, f"the loss rose to {value:.4g}, more than {factor:g} times its median,")
        if applied:
            self._losses.append(value)
