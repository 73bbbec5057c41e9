"""What a rank decodes, as requests to a loader: training steps lane by lane, validation batch by batch."""

import math
from collections.abc import Container, Iterator

import numpy as np

from distrain.config import Config
from distrain.data.augmentation.crops import center_crop_boxes, draw_crop_boxes, size_at
from distrain.data.index import Index
from distrain.data.loading.loader import Request
from distrain.data.sampling.lanes import IntArray
from distrain.data.sampling.order import resolve_shuffle
from distrain.data.sampling.plan import LaneBatch, Plan
from distrain.failpoints import failpoint


def train_requests(
    config: Config, plan: Plan, index: Index, lanes: range, start: int = 0, skipped_steps: Container[int] = ()
) -> Iterator[Request]:
    """Yield one request per lane for every step from `start` on, except `skipped_steps`.

    All images of a step have the size that is due where it starts.
    """
    windowed = resolve_shuffle(config.data, index) == "window"
    ahead = len(lanes) * requests_per_window(config, index, config.batch.per_lane) if windowed else 0

    def request(lane: int, stream_pos: IntArray, size: int) -> Request:
        samples = plan.lane_samples(lane, stream_pos)
        widths, heights = index.width[samples.ids], index.height[samples.ids]
        crops = draw_crop_boxes(config.augment, config.data, config.run.seed, samples, widths, heights)

        def replacement(bad: int) -> Request:
            """The sample of the lane after the bad one, so that every run replaces it by the same sample."""
            return request(lane, stream_pos[bad : bad + 1] + 1, size)

        return Request(samples, crops, size, replacement, augmented=True, ahead=ahead)

    for step in (step for step in range(start, plan.steps) if step not in skipped_steps):
        size = size_at(config.data, plan.epoch_at(step), config.train.epochs)
        for lane in lanes:
            failpoint("data.request", step)
            yield request(lane, plan.layout.stream_positions(step), size)


def validation_requests(config: Config, index: Index, batches: range) -> Iterator[Request]:
    """Yield a request for each of these batches of `evaluate.batch` images; the last one may be smaller."""
    ahead = requests_per_window(config, index, config.evaluate.batch * batches.step) if index.remote else 0
    for number in batches:
        start = number * config.evaluate.batch
        ids = np.arange(start, min(start + config.evaluate.batch, len(index)))
        samples = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
        crops = center_crop_boxes(config.data, index.width[ids], index.height[ids])
        yield Request(samples, crops, config.data.image_size, ahead=ahead)


def requests_per_window(config: Config, index: Index, stride: int) -> int:
    """Return how many requests, each `stride` samples after the previous one, span data.window_shards shards.

    Shards are prefetched that many requests ahead.
    """
    return math.ceil(config.data.window_shards * len(index) / len(index.shards) / stride)
