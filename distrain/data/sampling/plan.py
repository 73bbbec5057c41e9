"""The plan of a run: which samples each lane consumes at each step. Pure; knows nothing of I/O or ranks.

Lay the epochs end to end and number the positions 0, 1, 2, ... Step s takes positions [s G, (s+1) G) for a
global batch G = lanes x per_lane, and lane l takes per_lane of them, from s G + l per_lane on. So every sample
is seen once per epoch whatever the sizes, a step may straddle the end of an epoch, nothing is dropped or
padded, and all lanes pass from one epoch to the next together.

Which sample stands at a position is the business of an Order. A lane's own stream numbers its positions 0, 1,
2, ... too; it is what a window shuffle follows, and where a replacement for a bad sample is found.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class LaneBatch(NamedTuple):
    """Samples of one lane: ids, the epoch each belongs to, and the how-manieth time of the epoch this is (0 for
    the first). int64 [n] each."""

    ids: IntArray
    epochs: IntArray
    repeat_index: IntArray


class Share(NamedTuple):
    """The positions of one epoch that a lane consumes: `size` of them, after `before` of the lanes before it."""

    before: int
    size: int


class Order(Protocol):
    """Puts samples on the positions of an epoch."""

    def at(self, epoch: int, lane: int, share: Share, own: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
        """Ids and copies of what `lane` consumes: `own` are places in its share, `places` those in the epoch."""
        ...


@dataclass(frozen=True)
class Plan:
    """`samples` in an epoch and `lanes` x `per_lane` in a step, for `epochs` epochs."""

    samples: int
    lanes: int
    per_lane: int
    epochs: float
    order: Order

    @property
    def batch(self) -> int:
        """Samples in one step, over all lanes."""
        return self.lanes * self.per_lane

    @cached_property
    def steps(self) -> int:
        """Steps in the run: epochs x samples / global batch, rounded, at least one."""
        return max(1, self.step_at(self.epochs))

    def step_at(self, epoch: float) -> int:
        """The step boundary nearest to the end of `epoch` epochs."""
        return round(epoch * self.samples / self.batch)

    def steps_every(self, epochs: float) -> set[int]:
        """The step boundaries after each `epochs` epochs, and the end of the run."""
        return {self.step_at(times * epochs) for times in range(1, int(self.epochs / epochs) + 1)} | {self.steps}

    def epoch_at(self, step: int) -> float:
        """Epochs of samples consumed before `step`."""
        return step * self.batch / self.samples

    def lane_batch(self, step: int, lane: int) -> LaneBatch:
        """What `lane` consumes at `step`."""
        return self.lane_samples(lane, self.stream(step))

    def stream(self, step: int) -> IntArray:
        """The positions of a lane's own stream that it consumes at `step`; the same for every lane."""
        return np.arange(step * self.per_lane, (step + 1) * self.per_lane)

    def lane_samples(self, lane: int, stream: IntArray) -> LaneBatch:
        """What stands at the positions `stream` of a lane's own stream."""
        steps, inside = np.divmod(stream, self.per_lane)
        epochs, places = np.divmod(steps * self.batch + lane * self.per_lane + inside, self.samples)
        ids, repeat_index = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            own = stream[here] - self._consumed(int(epoch), lane)
            share = self.share(int(epoch), lane)
            ids[here], repeat_index[here] = self.order.at(int(epoch), lane, share, own, places[here])
        return LaneBatch(ids, epochs, repeat_index)

    def share(self, epoch: int, lane: int) -> Share:
        """How much of an epoch is the lane's, and how much of it that of the lanes before."""
        before = self._consumed_before(epoch + 1, lane) - self._consumed_before(epoch, lane)
        return Share(before, self._consumed(epoch + 1, lane) - self._consumed(epoch, lane))

    def _consumed(self, epoch: int, lane: int) -> int:
        """How far into its own stream the lane is when `epoch` begins."""
        steps, rest = divmod(epoch * self.samples, self.batch)
        return steps * self.per_lane + min(max(rest - lane * self.per_lane, 0), self.per_lane)

    def _consumed_before(self, epoch: int, lane: int) -> int:
        """How far all lanes before this one together are into theirs."""
        steps, rest = divmod(epoch * self.samples, self.batch)
        return steps * self.per_lane * lane + min(rest, lane * self.per_lane)
