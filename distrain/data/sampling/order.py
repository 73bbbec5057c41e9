"""Ways to put the samples of a data set in order, anew in each epoch. All are functions of (seed, epoch)."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distrain.config import DataConfig
from distrain.data.index import Index
from distrain.data.sampling.plan import IntArray, Order, Share
from distrain.errors import UserError
from distrain.rng import Stream, hash64

LEAST_WINDOW = 10  # shards: with fewer, batches show which shard they come from, and training suffers
_HASHED_AT_ONCE = 2**16  # what fits the processor's cache


class GlobalOrder:
    """One random permutation of all samples in each epoch."""

    def __init__(self, samples: int, seed: int) -> None:
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permute(samples, seed, epoch))

    def at(self, epoch: int, lane: int, share: Share, own: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
        return self._epoch(epoch)[places].astype(np.int64), np.zeros_like(places)


class RepeatedOrder:
    """Each sample of a permutation several times in a row, so that its copies, which are augmented differently,
    meet in one batch (Hoffer et al. 2020). An epoch is as long as ever and holds 1 / repeats of the samples."""

    def __init__(self, samples: int, seed: int, repeats: int) -> None:
        self._repeats = repeats
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permute(samples, seed, epoch))

    def at(self, epoch: int, lane: int, share: Share, own: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
        which, repeat_index = np.divmod(places, self._repeats)
        return self._epoch(epoch)[which].astype(np.int64), repeat_index


class BalancedOrder:
    """Every class equally often in each epoch: of small classes some samples come again, of large ones some have
    to wait for a later epoch."""

    def __init__(self, labels: NDArray[np.int32], seed: int) -> None:
        self._labels = labels
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._balance)

    def at(self, epoch: int, lane: int, share: Share, own: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
        ids, repeat_index = self._epoch(epoch)
        return ids[places].astype(np.int64), repeat_index[places].astype(np.int64)

    def _balance(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, repeat_index = self._take_turns(epoch)
        mixed = permute(len(ids), self._seed, epoch, 1)
        return ids[mixed], repeat_index[mixed]

    def _take_turns(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """One of each class, another of each, ...: ids and copies, int32 [samples] each."""
        samples = len(self._labels)
        shuffled = permute(samples, self._seed, epoch)
        by_class = shuffled[np.argsort(self._labels[shuffled], kind="stable")]
        sizes = np.unique(self._labels, return_counts=True)[1].astype(np.int32)
        starts = np.cumsum(sizes, dtype=np.int32) - sizes
        turns, which = np.divmod(np.arange(samples, dtype=np.int32), np.int32(len(sizes)))
        # What does not divide by the number of classes goes to other classes in every epoch.
        which = (which + epoch * samples % len(sizes)) % np.int32(len(sizes))
        repeat_index, member = np.divmod(turns, sizes[which])
        return by_class[starts[which] + member], repeat_index


class WindowOrder:
    """Shards are permuted, their samples laid end to end and cut into the lanes' shares; each share is cut into equal
    windows of at least so many shards, if it has as many, and shuffled inside of these. A lane reads few shards at a
    time and each of them once."""

    def __init__(self, shard_of_sample: NDArray[np.int32], lanes: int, window_shards: int, seed: int) -> None:
        self._seed = seed
        self._starts = np.flatnonzero(np.diff(shard_of_sample, prepend=-1))
        self._sizes = np.diff(self._starts, append=len(shard_of_sample))
        self._window = max(1, round(window_shards * len(shard_of_sample) / len(self._starts)))
        self._share = lru_cache(maxsize=2 * lanes)(self._arrange)

    def at(self, epoch: int, lane: int, share: Share, own: IntArray, places: IntArray) -> tuple[IntArray, IntArray]:
        return self._share(epoch, share)[own].astype(np.int64), np.zeros_like(places)

    def _arrange(self, epoch: int, share: Share) -> NDArray[np.int32]:
        """The ids of one share, in the order in which they are consumed."""
        shards = permute(len(self._starts), self._seed, epoch)
        ends = np.cumsum(self._sizes[shards])
        windows = max(1, share.size // self._window)
        cuts = [share.size * number // windows for number in range(windows + 1)]
        arranged = np.empty(share.size, np.int32)
        for first, end in pairwise(cuts):
            places = share.before + np.arange(first, end)
            row = np.searchsorted(ends, places, side="right")
            ids = self._starts[shards[row]] + places - (ends - self._sizes[shards])[row]
            arranged[first:end] = ids[np.argsort(hash64(self._seed, Stream.ORDER, epoch, ids, 1), kind="stable")]
        return arranged


def make_order(data: DataConfig, index: Index, lanes: int, seed: int) -> Order:
    """The order that the configuration asks for. Raises UserError for windows that would hardly mix."""
    if data.balanced:
        return BalancedOrder(index.label, seed)
    if data.repeats > 1:
        return RepeatedOrder(len(index), seed, data.repeats)
    if resolve_shuffle(data, index) == "window":
        least = min(LEAST_WINDOW, len(index.shards))
        if data.window_shards < least:
            raise UserError(
                f"data.window_shards={data.window_shards} mixes too few shards with one another: set at least {least}"
            )
        return WindowOrder(index.shard, lanes, data.window_shards, seed)
    return GlobalOrder(len(index), seed)


def resolve_shuffle(data: DataConfig, index: Index) -> str:
    """What `data.shuffle` means for this data: reads in any order where they are local, else shard by shard."""
    if data.shuffle != "auto":
        return data.shuffle
    return "window" if index.remote else "global"


def permute(count: int, seed: int, *keys: int) -> NDArray[np.int32]:
    """0 .. count-1 sorted by a hash of (seed, keys, number). int32 [count]."""
    hashes = np.empty(count, np.uint64)
    for first in range(0, count, _HASHED_AT_ONCE):
        numbers = np.arange(first, min(first + _HASHED_AT_ONCE, count))
        hashes[first : first + len(numbers)] = hash64(seed, Stream.ORDER, *keys, numbers)
    return np.argsort(hashes, kind="stable").astype(np.int32)
