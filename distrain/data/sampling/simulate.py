"""What a cluster would do with a data set, worked out on one machine: planning, downloads, cache, mixing."""

import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import Index
from distrain.data.sampling.order import GlobalOrder, WindowOrder
from distrain.data.sampling.plan import IntArray, Order, Plan

_NODES_LOOKED_AT = 8
_STEPS_LOOKED_AT = 20


@dataclass(frozen=True)
class Simulation:
    """Of one epoch under one shuffle. Bytes and shards are those of the node that has most of them."""

    steps: int
    plan_seconds: float
    """To put the epoch in order, on each rank."""
    plan_bytes: int
    """Peak memory of that, beyond the index."""
    node_shards: int
    """Shards that hold a sample of the node."""
    node_share: float
    """Bytes of those shards / bytes of the node's samples: what is downloaded for what is used."""
    cache_bytes: int
    """Most that is between its first and its last use at a time: the cache that spares second downloads."""
    same_shard: float
    """Share of the pairs of samples in a global batch that come from one shard."""


def simulate(index: Index, shuffle: str, nodes: int, gpus: int, per_lane: int, window_shards: int) -> Simulation:
    """Follow one epoch of `index` on `nodes` x `gpus` ranks of one lane each."""
    lanes = nodes * gpus
    tracemalloc.start()
    began = time.perf_counter()
    plan = Plan(len(index), lanes, per_lane, 1, make_order(index, shuffle, lanes, window_shards))
    plan.lane_batch(0, 0)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    sizes = np.array([shard.size for shard in index.shards])
    looked_at = np.unique(np.linspace(0, nodes - 1, min(nodes, _NODES_LOOKED_AT)).astype(int))
    all_reads = [node_reads(plan, range(node * gpus, (node + 1) * gpus)) for node in looked_at]
    reads = [(ids, steps) for ids, steps in all_reads if len(ids)]  # an epoch may end before the last node's turn
    downloads = [np.unique(index.shard[ids]) for ids, _ in reads]
    used = [max(1, index.size[ids].astype(np.int64).sum()) for ids, _ in reads]
    return Simulation(
        steps=plan.steps,
        plan_seconds=seconds,
        plan_bytes=peak,
        node_shards=max(len(shards) for shards in downloads),
        node_share=max(float(sizes[s].sum() / u) for s, u in zip(downloads, used, strict=True)),
        cache_bytes=max(peak_cache(index.shard[ids], steps, sizes) for ids, steps in reads),
        same_shard=same_shard_pairs(index, plan),
    )


def make_order(index: Index, shuffle: str, lanes: int, window_shards: int) -> Order:
    """The order under test, with seed 0."""
    if shuffle == "window":
        return WindowOrder(index.shard, lanes, window_shards, 0)
    return GlobalOrder(len(index), 0)


def node_reads(plan: Plan, lanes: range) -> tuple[IntArray, IntArray]:
    """What a node reads in the first epoch, and the step at which it does: two arrays [n]."""
    batches = []
    for lane in lanes:
        stream = np.arange(plan.share(0, lane).size)
        batches.append((plan.lane_samples(lane, stream).ids, stream // plan.per_lane))
    ids, steps = (np.concatenate(column) for column in zip(*batches, strict=True))
    return ids, steps


def peak_cache(shards: NDArray[np.int32], steps: IntArray, sizes: NDArray[np.int64]) -> int:
    """Most bytes of shards between their first and their last read, over all steps."""
    first = np.full(len(sizes), np.iinfo(np.int64).max)
    last = np.full(len(sizes), -1)
    np.minimum.at(first, shards, steps)
    np.maximum.at(last, shards, steps)
    read = np.flatnonzero(last >= 0)
    change = np.zeros(int(steps.max()) + 2, np.int64)
    np.add.at(change, first[read], sizes[read])
    np.add.at(change, last[read] + 1, -sizes[read])
    return int(np.cumsum(change).max())


def same_shard_pairs(index: Index, plan: Plan) -> float:
    """Share of the pairs of samples in a global batch that come from one shard, over some steps of an epoch."""
    pairs, same = 0, 0
    for step in np.unique(np.linspace(0, max(0, plan.steps - 1), _STEPS_LOOKED_AT).astype(int)):
        ids = np.concatenate([plan.lane_batch(int(step), lane).ids for lane in range(plan.lanes)])
        pairs += len(ids) * (len(ids) - 1)
        same += sum(count * (count - 1) for count in Counter(index.shard[ids].tolist()).values())
    return same / max(pairs, 1)
