"""Orders of the samples in an epoch, each a pure function of (seed, epoch)."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distrain.config import DataConfig
from distrain.data.index import Index
from distrain.data.sampling.lanes import IntArray, LaneLayout
from distrain.data.sampling.plan import Order
from distrain.errors import UserError
from distrain.rng import Stream, hash64

_MIN_WINDOW_SHARDS = 10  # with fewer, batches are correlated by shard, and accuracy suffers
_HASH_BLOCK = 2**16  # numbers hashed at once: fits the processor's cache


class GlobalOrder:
    """One random permutation of all samples in each epoch."""

    def __init__(self, samples: int, seed: int) -> None:
        self._permuted = lru_cache(maxsize=2)(lambda epoch: permute(samples, seed, epoch))

    def at(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        return self._permuted(epoch)[epoch_pos].astype(np.int64), np.zeros_like(epoch_pos)


class RepeatedOrder:
    """Each sample of a permutation `repeats` times in a row, so that one batch holds several augmentations of it
    (Hoffer et al. 2020). An epoch keeps its length and holds 1 / repeats of the samples."""

    def __init__(self, samples: int, seed: int, repeats: int) -> None:
        self._repeats = repeats
        self._permuted = lru_cache(maxsize=2)(lambda epoch: permute(samples, seed, epoch))

    def at(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        row, repeat_index = np.divmod(epoch_pos, self._repeats)
        return self._permuted(epoch)[row].astype(np.int64), repeat_index


class BalancedOrder:
    """Every class equally often in each epoch: samples of small classes repeat, some of large classes wait for a later
    epoch."""

    def __init__(self, labels: NDArray[np.int32], seed: int) -> None:
        self._labels = labels
        self._seed = seed
        self._balanced = lru_cache(maxsize=2)(self._balance)

    def at(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        ids, repeat_index = self._balanced(epoch)
        return ids[epoch_pos].astype(np.int64), repeat_index[epoch_pos].astype(np.int64)

    def _balance(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, repeat_index = self._round_robin(epoch)
        shuffled = permute(len(ids), self._seed, epoch, 1)
        return ids[shuffled], repeat_index[shuffled]

    def _round_robin(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Take one sample of each class in turn. Returns ids and repeat indices, int32 [samples] each."""
        samples = len(self._labels)
        shuffled = permute(samples, self._seed, epoch)
        by_class = shuffled[np.argsort(self._labels[shuffled], kind="stable")]
        sizes = np.unique(self._labels, return_counts=True)[1].astype(np.int32)
        starts = np.cumsum(sizes, dtype=np.int32) - sizes
        rounds, row = np.divmod(np.arange(samples, dtype=np.int32), np.int32(len(sizes)))
        # If the classes do not divide the samples, the incomplete last round goes to other classes in every epoch.
        row = (row + epoch * samples % len(sizes)) % np.int32(len(sizes))
        repeat_index, member = np.divmod(rounds, sizes[row])
        return by_class[starts[row] + member], repeat_index


class WindowOrder:
    """Sequential reads: shards are permuted, their samples laid end to end and divided into the lanes' shares. Each
    share is divided into equal windows of at least `window_shards` shards, if it has that many, and shuffled within
    each. A lane reads few shards at a time and each of them once."""

    def __init__(self, shard_of_sample: NDArray[np.int32], layout: LaneLayout, window_shards: int, seed: int) -> None:
        self._layout = layout
        self._seed = seed
        self._starts = np.flatnonzero(np.diff(shard_of_sample, prepend=-1))
        self._sizes = np.diff(self._starts, append=len(shard_of_sample))
        self._window = max(1, round(window_shards * len(shard_of_sample) / len(self._starts)))
        self._shuffled = lru_cache(maxsize=2 * layout.lanes)(self._shuffle)

    def at(self, epoch: int, epoch_pos: IntArray) -> tuple[IntArray, IntArray]:
        lanes, lane_pos = self._layout.to_lanes(epoch, epoch_pos)
        ids = np.empty_like(epoch_pos)
        for lane in np.unique(lanes):
            same = lanes == lane
            ids[same] = self._shuffled(epoch, int(lane))[lane_pos[same]]
        return ids, np.zeros_like(ids)

    def _shuffle(self, epoch: int, lane: int) -> NDArray[np.int32]:
        """The ids of a lane's share of an epoch, in the order in which they are consumed."""
        shards = permute(len(self._starts), self._seed, epoch)
        ends = np.cumsum(self._sizes[shards])
        share = self._layout.share(epoch, lane)
        windows = max(1, len(share) // self._window)
        bounds = [len(share) * number // windows for number in range(windows + 1)]
        shuffled = np.empty(len(share), np.int32)
        for first, end in pairwise(bounds):
            positions = share.start + np.arange(first, end)
            row = np.searchsorted(ends, positions, side="right")
            ids = self._starts[shards[row]] + positions - (ends - self._sizes[shards])[row]
            shuffled[first:end] = ids[np.argsort(hash64(self._seed, Stream.ORDER, epoch, ids, 1), kind="stable")]
        return shuffled


def make_order(data: DataConfig, index: Index, layout: LaneLayout, seed: int) -> Order:
    """Return the configured order. Raises UserError if data.window_shards is too small to mix samples well, or
    data.balanced does not know the class of a sample."""
    if data.balanced and index.multi_label:
        raise UserError(
            "data.balanced=true needs one label per image, and data.train is multi-label: set data.balanced=false "
            "and loss.class_weights=balanced"
        )
    if data.balanced:
        return BalancedOrder(index.label, seed)
    if data.repeats > 1:
        return RepeatedOrder(len(index), seed, data.repeats)
    if resolve_shuffle(data, index) == "window":
        least = min(_MIN_WINDOW_SHARDS, len(index.shards))
        if data.window_shards < least:
            raise UserError(f"data.window_shards={data.window_shards} mixes too few shards: set at least {least}")
        return WindowOrder(index.shard, layout, data.window_shards, seed)
    return GlobalOrder(len(index), seed)


def resolve_shuffle(data: DataConfig, index: Index) -> str:
    """Resolve data.shuffle=auto: `global` where shards are local and random reads are cheap, else `window`."""
    if data.shuffle != "auto":
        return data.shuffle
    return "window" if index.remote else "global"


def permute(count: int, seed: int, *keys: int) -> NDArray[np.int32]:
    """Return 0 .. count-1 sorted by a hash of (seed, keys, number). int32 [count]."""
    hashes = np.empty(count, np.uint64)
    for first in range(0, count, _HASH_BLOCK):
        numbers = np.arange(first, min(first + _HASH_BLOCK, count))
        hashes[first : first + len(numbers)] = hash64(seed, Stream.ORDER, *keys, numbers)
    return np.argsort(hashes, kind="stable").astype(np.int32)
