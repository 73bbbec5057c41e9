"""How samples are dealt to lanes: arithmetic on positions.

Lay the epochs end to end and number the positions 0, 1, 2, ... Step s consumes positions [s G, (s+1) G) for a global
batch G = lanes x per_lane, and lane l takes per_lane of them, from s G + l per_lane on. So every sample is seen once
per epoch for any sizes, a step may straddle the end of an epoch, nothing is dropped or padded, and all lanes pass
from one epoch to the next together.

Positions are counted in three ways, each from 0:

    stream_pos  in everything one lane consumes, from the start of the run
    epoch_pos   in one epoch, over all lanes
    lane_pos    in what one lane consumes of one epoch
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class LaneLayout:
    """`samples` in an epoch, dealt to `lanes` lanes that consume `per_lane` each in a step."""

    samples: int
    lanes: int
    per_lane: int

    @property
    def batch(self) -> int:
        """Global batch: samples in one step, over all lanes."""
        return self.lanes * self.per_lane

    def stream_positions(self, step: int) -> IntArray:
        """Positions in a lane's stream that it consumes at `step`, the same for every lane. int64 [per_lane]."""
        return np.arange(step * self.per_lane, (step + 1) * self.per_lane)

    def to_epoch(self, lane: int, stream_pos: IntArray) -> tuple[IntArray, IntArray]:
        """Convert positions in the stream of `lane` to epochs and positions in them."""
        steps, in_lane = np.divmod(stream_pos, self.per_lane)
        epochs, epoch_pos = np.divmod(steps * self.batch + lane * self.per_lane + in_lane, self.samples)
        return epochs, epoch_pos

    def to_lanes(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        """Convert positions in `epoch` to lanes and positions in their shares of it."""
        steps, in_step = np.divmod(epoch * self.samples + epoch_pos, self.batch)
        lanes, in_lane = np.divmod(in_step, self.per_lane)
        return lanes, steps * self.per_lane + in_lane - self._consumed(epoch, lanes)

    def share(self, epoch: int, lane: int) -> range:
        """Return what `lane` consumes of an epoch in which the shares of all lanes are laid end to end."""
        start = self._consumed_by_earlier_lanes(epoch + 1, lane) - self._consumed_by_earlier_lanes(epoch, lane)
        size = self._consumed(epoch + 1, lane) - self._consumed(epoch, lane)
        return range(start, start + int(size))

    def _consumed(self, epoch: int, lanes: IntArray | int) -> IntArray:
        """Samples that each of `lanes` has consumed when `epoch` begins."""
        steps, rest = divmod(epoch * self.samples, self.batch)
        return np.asarray(steps * self.per_lane + np.clip(rest - lanes * self.per_lane, 0, self.per_lane))

    def _consumed_by_earlier_lanes(self, epoch: int, lane: int) -> int:
        """Samples all lanes before `lane` together have consumed when `epoch` begins."""
        steps, rest = divmod(epoch * self.samples, self.batch)
        return steps * self.per_lane * lane + min(rest, lane * self.per_lane)
