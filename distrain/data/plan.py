"""The plan of a run: which samples each lane consumes at each step. Pure; knows nothing of I/O or ranks.

Lay the epochs end to end, each in its own random order, and number the positions 0, 1, 2, ... Step s takes
positions [s G, (s+1) G) for a global batch G = lanes x per_lane, and lane l takes per_lane of them, from
s G + l per_lane on. So every sample is seen once per epoch whatever the sizes, a step may straddle the end
of an epoch, nothing is dropped or padded, and all lanes pass from one epoch to the next together.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.rng import Stream, hash64


class LaneBatch(NamedTuple):
    """One lane's share of one step: sample ids and the epoch each belongs to, int64 [per_lane]."""

    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]


@lru_cache(maxsize=2)  # a step that straddles the end of an epoch needs two
def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int32]:
    """The order of one epoch: sample ids sorted by a hash of (seed, epoch, id), int32 [samples]."""
    keys = hash64(seed, Stream.ORDER, epoch, np.arange(samples))
    return np.argsort(keys, kind="stable").astype(np.int32)


@dataclass(frozen=True)
class Plan:
    """`samples` in the data set, `lanes` x `per_lane` in a step, in an order drawn from `seed`."""

    samples: int
    lanes: int
    per_lane: int
    epochs: float
    seed: int

    @property
    def batch(self) -> int:
        """Samples in one step, over all lanes."""
        return self.lanes * self.per_lane

    @property
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
        start = step * self.batch + lane * self.per_lane
        epochs, places = np.divmod(np.arange(start, start + self.per_lane, dtype=np.int64), self.samples)
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = epoch_order(self.seed, int(epoch), self.samples)[places[here]]
        return LaneBatch(ids, epochs)
