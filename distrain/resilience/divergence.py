"""Training that stops making sense: updates that have to be skipped one after the other, losses that shoot up."""

import statistics
from collections import deque

import torch

from distrain.config import ResilienceConfig

_REMEMBERED = 100  # losses whose median a spike is measured by


class Diverged(Exception):  # noqa: N818, the run may yet be saved
    """Training has to go back to the last checkpoint and pass over what led here."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} up to step {step}")
        self.step = step


class Divergence:
    """Looks at every step, one step late, so that nobody has to wait for the device to know its loss.

    Equal on all ranks, as what it is shown is.
    """

    def __init__(self, config: ResilienceConfig) -> None:
        self._config = config
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)
        self._latest: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def see(self, step: int, loss: torch.Tensor, applied: torch.Tensor) -> None:
        """Take in the loss and whether the update of `step` was applied. Raises Diverged for what was seen before."""
        before, self._latest = self._latest, (step, loss, applied)
        if before is not None:
            self._judge(*before)

    def _judge(self, step: int, loss: torch.Tensor, applied: torch.Tensor) -> None:
        self._skipped = 0 if applied else self._skipped + 1
        if self._config.bad_steps and self._skipped >= self._config.bad_steps:
            raise Diverged(step, f"{self._skipped} updates in a row had no finite gradient,")
        value = float(loss)
        factor = self._config.spike
        if factor and len(self._losses) == _REMEMBERED and value > factor * statistics.median(self._losses):
            raise Diverged(step, f"the loss rose to {value:.4g}, more than {factor:g} times its median,")
        if applied:
            self._losses.append(value)
