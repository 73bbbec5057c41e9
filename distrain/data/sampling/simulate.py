"""Simulates what a cluster would do with a data set, on one machine: planning, downloads, cache, mixing."""

import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.data.index import Index
from distrain.data.sampling.lanes import IntArray, LaneLayout
from distrain.data.sampling.order import GlobalOrder, WindowOrder
from distrain.data.sampling.plan import Order, Plan

_MAX_NODES = 8  # nodes and steps that are simulated, evenly spaced
_MAX_STEPS = 20


@dataclass(frozen=True)
class Simulation:
    """One epoch under one shuffle. Bytes and shards are the maximum over nodes."""

    steps: int
    plan_seconds: float
    """Time to compute the order of the epoch, on each rank."""
    plan_bytes: int
    """Peak memory of that, beyond the index."""
    node_shards: int
    """Shards that hold a sample of the node."""
    node_share: float
    """Bytes of those shards / bytes of the node's samples: downloaded / used."""
    cache_bytes: int
    """Peak bytes of shards between their first and last use: the cache size that avoids repeated downloads."""
    same_shard: float
    """Fraction of the pairs of samples in a global batch that come from one shard."""


def simulate(index: Index, shuffle: str, nodes: int, gpus: int, per_lane: int, window_shards: int) -> Simulation:
    """Simulate one epoch of `index` on `nodes` x `gpus` ranks of one lane each."""
    layout = LaneLayout(len(index), nodes * gpus, per_lane)
    tracemalloc.start()
    began = time.perf_counter()
    plan = Plan(layout, 1, make_order(index, shuffle, layout, window_shards))
    plan.lane_batch(0, 0)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    sizes = np.array([shard.size for shard in index.shards])
    sampled_nodes = np.unique(np.linspace(0, nodes - 1, min(nodes, _MAX_NODES)).astype(int))
    all_reads = [node_reads(plan, range(node * gpus, (node + 1) * gpus)) for node in sampled_nodes]
    reads = [(ids, steps) for ids, steps in all_reads if len(ids)]  # a short epoch may not reach the last node
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


def make_order(index: Index, shuffle: str, layout: LaneLayout, window_shards: int) -> Order:
    """Return the order to simulate, with seed 0."""
    if shuffle == "window":
        return WindowOrder(index.shard, layout, window_shards, 0)
    return GlobalOrder(len(index), 0)


def node_reads(plan: Plan, lanes: range) -> tuple[IntArray, IntArray]:
    """Return the samples a node reads in the first epoch, and at which step each: two arrays [n]."""
    batches = []
    for lane in lanes:
        stream_pos = np.arange(len(plan.layout.share(0, lane)))
        batches.append((plan.lane_samples(lane, stream_pos).ids, stream_pos // plan.layout.per_lane))
    ids, steps = (np.concatenate(column) for column in zip(*batches, strict=True))
    return ids, steps


def peak_cache(shards: NDArray[np.int32], steps: IntArray, sizes: NDArray[np.int64]) -> int:
    """Return the peak bytes of shards between their first and last read, over all steps."""
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
    """Return the fraction of pairs in a global batch that come from one shard, over some steps of an epoch."""
    pairs, same = 0, 0
    for step in np.unique(np.linspace(0, max(0, plan.steps - 1), _MAX_STEPS).astype(int)):
        ids = np.concatenate([plan.lane_batch(int(step), lane).ids for lane in range(plan.layout.lanes)])
        pairs += len(ids) * (len(ids) - 1)
        same += sum(count * (count - 1) for count in Counter(index.shard[ids].tolist()).values())
    return same / max(pairs, 1)
