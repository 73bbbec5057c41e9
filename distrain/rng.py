"""Randomness as a pure function of its keys.

Everything random in a run is a hash of (seed, stream, epoch or step, lane or sample, draw), so no generator
state has to be saved, and no draw depends on the order in which ranks or threads run. The hash is implemented
here because its values must never change between library versions, which neither numpy nor torch guarantees.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class Stream(IntEnum):
    """Purpose of a draw: the same keys in different streams give independent values."""

    INIT = 0
    ORDER = 1
    CROP = 2
    FLIP = 3
    FORWARD = 4
    PIXELS = 5
    SPACE = 6
    MIX = 7


def hash64(*keys: ArrayLike) -> NDArray[np.uint64]:
    """Hash non-negative integers, or arrays of them that broadcast, to 64 uniform bits.

    Each key is mixed in by one round of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, figure 15).
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX1
            state = (state ^ (state >> np.uint64(27))) * _MIX2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def uniform(*keys: ArrayLike) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), one per key tuple."""
    return np.asarray((hash64(*keys) >> np.uint64(11)) * 2.0**-53, np.float64)


def torch_seed(*keys: int) -> int:
    """Return a seed for `torch.manual_seed`."""
    return int(hash64(*keys) >> np.uint64(1))
