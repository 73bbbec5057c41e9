"""Puts the parts of the data plane together for a run: index, plan, store, loader."""

import math
import socket
import time
from collections.abc import Callable, Container, Iterator
from contextlib import closing
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch

from distrain.config import Config
from distrain.data.augmentation.crops import center_crop_boxes, draw_crop_boxes, size_at
from distrain.data.index import Index
from distrain.data.loading import LOADERS, open_loader
from distrain.data.loading.loader import Loader, Request
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.sampling.order import make_order, resolve_shuffle
from distrain.data.sampling.plan import IntArray, LaneBatch, Plan
from distrain.data.storage.index_file import load_index
from distrain.data.storage.remote import open_store
from distrain.decisions import RunDecisions
from distrain.errors import UserError
from distrain.failpoints import failpoint

_TRIAL_BATCHES = 8  # at least
_TRIAL_ROUNDS = 2


def load_indexes(config: Config) -> tuple[Index, Index]:
    """The training and validation index. Raises UserError unless both have the classes the model is to learn."""
    train_index, val_index = (load_index(path, config.download) for path in (config.data.train, config.data.val))
    if train_index.classes != val_index.classes:
        raise UserError(f"{config.data.val} has other classes than {config.data.train}; index both with one list")
    classes = len(train_index.classes)
    if classes != config.model.num_classes:
        raise UserError(
            f"model.num_classes={config.model.num_classes}, but {config.data.train} has {classes} classes: "
            f"set model.num_classes={classes}"
        )
    return train_index, val_index


def make_plan(config: Config, index: Index) -> Plan:
    """Which samples each lane consumes at each step."""
    lanes, per_lane = config.batch.lanes, config.batch.per_lane
    order = make_order(config.data, index, lanes, config.run.seed)
    return Plan(len(index), lanes, per_lane, config.train.epochs, order)


def train_requests(
    config: Config, plan: Plan, index: Index, lanes: range, start: int = 0, skipped_steps: Container[int] = ()
) -> Iterator[Request]:
    """What a rank decodes: for every step from `start` on, but those `omitted`, the share of each of its lanes.

    All images of a step have the size of the epoch it starts in.
    """

    windowed = resolve_shuffle(config.data, index) == "window"
    ahead = len(lanes) * window_requests(config, index, config.batch.per_lane) if windowed else 0

    def request(lane: int, stream: IntArray, size: int) -> Request:
        samples = plan.lane_samples(lane, stream)
        widths, heights = index.width[samples.ids], index.height[samples.ids]
        crops = draw_crop_boxes(config.augment, config.data, config.run.seed, samples, widths, heights)

        def replacement(place: int) -> Request:
            """The next sample of the lane: known beforehand, so that every run replaces a bad one by the same."""
            return request(lane, stream[place : place + 1] + 1, size)

        return Request(samples, crops, size, replacement, augmented=True, ahead=ahead)

    for step in (step for step in range(start, plan.steps) if step not in skipped_steps):
        size = size_at(config.data, plan.epoch_at(step))
        for lane in lanes:
            failpoint("data.request", step)
            yield request(lane, plan.stream(step), size)


def validation_requests(config: Config, index: Index, batches: range) -> Iterator[Request]:
    """What to decode for these batches of `evaluate.batch` images each; the last one may be smaller."""
    ahead = window_requests(config, index, config.evaluate.batch * batches.step) if index.remote else 0
    for number in batches:
        start = number * config.evaluate.batch
        ids = np.arange(start, min(start + config.evaluate.batch, len(index)))
        samples = LaneBatch(ids, np.zeros_like(ids), np.zeros_like(ids))
        crops = center_crop_boxes(config.data, index.width[ids], index.height[ids])
        yield Request(samples, crops, config.data.image_size, ahead=ahead)


def make_quarantine(config: Config, index: Index, split: str) -> Quarantine:
    """The list of bad samples of a split, in the run's folder."""
    return Quarantine(config.run.folder / "quarantine.jsonl", split, len(index), config.data.max_bad)


def make_loader(config: Config, name: str, index: Index, quarantine: Quarantine, device: torch.device) -> Loader:
    """The loader `name` over an index. Raises UserError if it is not installed on this machine."""
    if name == "dali":
        _require_dali()
    source = SampleReader(index, open_store(index, config.download), quarantine)
    batch = max(config.batch.per_lane, config.evaluate.batch)
    return open_loader(name, config.data, config.augment, config.run.seed, batch, source, device)


def window_requests(config: Config, index: Index, stride: int) -> int:
    """How many requests, each of which goes on `stride` samples after the one before, a window of shards takes: so
    far ahead of need the store is told what to download."""
    return math.ceil(config.data.window_shards * len(index) / len(index.shards) / stride)


def choose_loader(config: Config, plan: Plan, index: Index, device: torch.device, info: Callable[[str], None]) -> str:
    """The loader to use: the configured one, or for `auto` the faster of all on the first batches of this run.

    The choice is kept in the run's folder, because another loader rounds pixels differently and a resumed run
    is to see the same ones. Raises UserError for a loader that is not installed.
    """
    chosen: str = config.data.loader
    if chosen == "auto":
        fastest = partial(_find_fastest, config, plan, index, device, info)
        chosen = str(RunDecisions(config.run.folder).get("loader", fastest))
    if chosen == "dali":
        _require_dali()
    return chosen


def _find_fastest(config: Config, plan: Plan, index: Index, device: torch.device, info: Callable[[str], None]) -> str:
    if not _has_dali():
        info("data.loader=auto: torch, because NVIDIA DALI is not installed")
        return "torch"
    quarantine = make_quarantine(config, index, "train")
    rates = dict.fromkeys(LOADERS, 0.0)
    for _ in range(_TRIAL_ROUNDS):
        for name in LOADERS:
            with closing(make_loader(config, name, index, quarantine, device)) as loader:
                rates[name] = max(rates[name], _measure(config, loader, plan, index))
    best = max(rates, key=lambda name: rates[name])
    info(f"data.loader=auto: {best}, of " + ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items()))
    return best


def _measure(config: Config, loader: Loader, plan: Plan, index: Index) -> float:
    """Images per second of one rank in the long run: nothing counts that was made ahead, nor a part of what the
    threads make side by side."""
    threads = config.data.threads
    requests = cycle(train_requests(config, plan, index, range(1)))
    with closing(loader.stream(requests)) as batches:
        for _ in range(max(config.data.prefetch, threads) + 1):
            next(batches)
        began = time.monotonic()
        images = sum(len(batch.labels) for batch in islice(batches, threads * math.ceil(_TRIAL_BATCHES / threads)))
        return images / (time.monotonic() - began)


def _require_dali() -> None:
    if not _has_dali():
        raise UserError(
            f"data.loader=dali needs NVIDIA DALI, which is not installed on {socket.gethostname()}: install "
            "nvidia-dali-cuda130 or set data.loader=torch",
            scope="rank",
        )


def _has_dali() -> bool:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True
