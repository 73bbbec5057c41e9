"""What the steps have led to, read on the host one step late, so that training never waits for the device."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step, on the host."""

    step: int
    """The number of updates that are done after it."""
    metrics: dict[str, float]
    applied: bool
    """Whether the weights were updated: they are not if the gradient is not finite."""


class LateReader:
    """Copies the scalars of each step to the host while the next step runs."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._buffer = torch.empty(0)
        self._names: tuple[str, ...] = ()
        self._known: dict[str, float] = {}
        self._step: int | None = None
        self._event = torch.cuda.Event() if self._on_gpu else None

    def read(self) -> Outcome | None:
        """Return the outcome of the step that was submitted last, once; None if there is none.

        Waits for the device to finish that step, and not for what was submitted to it since.
        """
        if self._step is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        step, self._step = self._step, None
        *values, applied = self._buffer.tolist()
        return Outcome(step, dict(zip(self._names, values, strict=True)) | self._known, bool(applied))

    def submit(
        self, step: int, metrics: Mapping[str, torch.Tensor], applied: torch.Tensor, known: Mapping[str, float]
    ) -> None:
        """Start to copy the outcome of a step: `metrics`, float [] each, and `applied`, bool [], both on the device.
        `known`: metrics that are on the host already. The step before must have been read."""
        assert self._step is None
        values = torch.stack([*metrics.values(), applied.float()])
        if len(self._buffer) != len(values):
            self._buffer = torch.empty(len(values), pin_memory=self._on_gpu)
        self._buffer.copy_(values, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._step, self._names, self._known = step, tuple(metrics), dict(known)
