"""Detecting divergence: repeated updates without a finite gradient, and loss spikes."""

import statistics
from collections import deque

from distrain.config import ResilienceConfig
from distrain.errors import Diverged
from distrain.outcomes import Outcome

_HISTORY = 100  # losses whose median a spike is compared with


class DivergenceDetector:
    """Checks the outcome of every step. Deterministic: every rank sees the same ones."""

    def __init__(self, config: ResilienceConfig) -> None:
        self._config = config
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=_HISTORY)

    def check(self, outcome: Outcome) -> None:
        """Raises Diverged if training has diverged at the step with this outcome."""
        step, loss = outcome.step - 1, outcome.metrics["train/loss"]
        self._skipped = 0 if outcome.applied else self._skipped + 1
        if self._config.bad_steps and self._skipped >= self._config.bad_steps:
            raise Diverged(step, f"{self._skipped} updates in a row had no finite gradient,")
        factor = self._config.spike
        if factor and len(self._losses) == _HISTORY and loss > factor * statistics.median(self._losses):
            raise Diverged(step, f"the loss rose to {loss:.4g}, more than {factor:g} times its median,")
        if outcome.applied:
            self._losses.append(loss)
