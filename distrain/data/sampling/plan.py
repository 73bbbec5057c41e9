"""The plan of a run: which samples each lane consumes at each step. Pure; knows nothing of I/O or ranks."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from distrain.data.sampling.lanes import IntArray, LaneLayout


class LaneBatch(NamedTuple):
    """Samples of one lane, int64 [n] each."""

    ids: IntArray
    epochs: IntArray
    repeat_index: IntArray
    """Repeat index within the epoch: 0 where a sample occurs for the first time."""


class Order(Protocol):
    """Maps the positions of an epoch to samples."""

    def at(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        """Return the sample ids at these positions and their repeat indices, int64 [n] each."""
        ...


@dataclass(frozen=True)
class Plan:
    """`epochs` epochs of samples in some order, dealt to lanes."""

    layout: LaneLayout
    epochs: float
    order: Order

    @property
    def batch(self) -> int:
        """Global batch: samples in one step, over all lanes."""
        return self.layout.batch

    @cached_property
    def steps(self) -> int:
        """Steps in the run: epochs x samples / global batch, rounded, at least one."""
        return max(1, self.step_at(self.epochs))

    def step_at(self, epoch: float) -> int:
        """Return the step boundary nearest to the end of `epoch` epochs."""
        return round(epoch * self.layout.samples / self.batch)

    def steps_every(self, epochs: float) -> set[int]:
        """Return the step boundaries after each `epochs` epochs, and the end of the run."""
        return {self.step_at(times * epochs) for times in range(1, int(self.epochs / epochs) + 1)} | {self.steps}

    def epoch_at(self, step: int) -> float:
        """Return the epochs of samples consumed before `step`."""
        return step * self.batch / self.layout.samples

    def lane_batch(self, step: int, lane: int) -> LaneBatch:
        """Return what `lane` consumes at `step`."""
        return self.lane_samples(lane, self.layout.stream_positions(step))

    def lane_samples(self, lane: int, stream_pos: IntArray) -> LaneBatch:
        """Return the samples at positions in the stream of `lane`."""
        epochs, epoch_pos = self.layout.to_epoch(lane, stream_pos)
        ids, repeat_index = np.empty_like(epoch_pos), np.empty_like(epoch_pos)
        for epoch in np.unique(epochs):
            same = epochs == epoch
            ids[same], repeat_index[same] = self.order.at(int(epoch), epoch_pos[same])
        return LaneBatch(ids, epochs, repeat_index)
