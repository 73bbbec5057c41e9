"""Statistics of the errors of design spaces (Radosavovic et al. 2020, sections 3.1 and 3.2).

Intervals are 95% percentile intervals of the bootstrap. Everything is a pure function of the data and a seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from distrain.sweep.population import Member, Status

Floats = NDArray[np.float64]

RESAMPLES = 2000
_LEVEL = 0.05
_FEWEST = 5  # networks of a space that an interval or a comparison needs: the bootstrap of fewer is far too narrow
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95% interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Distribution:
    """The empirical distribution function F(e), the fraction of networks with an error below e."""

    errors: Floats
    """Sorted and distinct: [k]."""
    fraction: Floats
    """F just above each: [k]."""
    low: Floats
    """Pointwise 95% band: [k]."""
    high: Floats
    count: int
    """Networks."""

    def at(self, error: float) -> float:
        """F(error)."""
        below = int(np.searchsorted(self.errors, error, side="left"))
        return float(self.fraction[below - 1]) if below else 0.0


@dataclass(frozen=True)
class Summary:
    """Errors of a space."""

    count: int
    mean: Interval
    min: Interval
    """Its interval ends at the value itself: no resample contains a smaller error."""
    median: Interval


@dataclass(frozen=True)
class Comparison:
    """Two samples of errors."""

    counts: tuple[int, int]
    difference: Interval
    """Mean error of the second minus that of the first."""
    mean_p: float
    """Of the hypothesis of equal means, from the bootstrap."""
    ks: float
    """Two-sample Kolmogorov-Smirnov statistic: the largest distance between the two distribution functions."""
    ks_p: float
    """Of the hypothesis of equal distributions."""

    def sentence(self, first: str, second: str) -> str:
        """The result in words, with the names of the spaces."""
        pair, sizes = f"{first} and {second}", f"n={self.counts[0]} and {self.counts[1]}"
        if min(self.counts) < _FEWEST:
            return f"{pair}: too few networks to compare at {sizes}, {_FEWEST} of each are needed"
        tests = f"{sizes} (means: {show_p(self.mean_p)}; Kolmogorov-Smirnov: D={self.ks:.2f}, {show_p(self.ks_p)})"
        if self.mean_p < _LEVEL:
            better, sign = (second, -1) if self.difference.value < 0 else (first, 1)
            low, high = sorted(100 * sign * end for end in (self.difference.low, self.difference.high))
            size = f"{100 * abs(self.difference.value):.2f} points lower (95% {low:.2f} to {high:.2f})"
            return f"{pair}: the mean error of {better} is {size} at {tests}"
        if self.ks_p < _LEVEL:
            return f"{pair}: the distributions differ, with no evidence of a difference of means, at {tests}"
        return f"{pair}: no evidence of a difference at {tests}"


@dataclass(frozen=True)
class Correlation:
    """How measured time follows a cost."""

    count: int
    pearson: Interval
    """Of the logarithms."""
    spearman: Interval


@dataclass(frozen=True)
class BestRange:
    """A property of the best networks, beside that of all networks they were drawn from."""

    count: int
    """Networks whose value is known."""
    best: Interval
    """Median and 95% range in the best networks."""
    sampled: Interval
    """Median and 95% range in all networks."""
    covered: int
    """Networks with a value within the 95% range of the best."""
    p: float
    """How often the range of the best covers as few networks if errors do not depend on the property."""

    @property
    def differs(self) -> bool:
        """Whether the best networks differ from the others: false for 95% of the properties that do not matter."""
        return self.p < _LEVEL

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.best.low == self.best.high and self.covered == self.count:
            return "the same in all networks"
        return "narrower than the sampled range" if self.differs else "not distinguishable from the sampled range"


def show_p(p: float) -> str:
    """A p-value for a sentence."""
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def finished(members: Sequence[Member]) -> list[Member]:
    """The members whose final error is known, the best first: pruned and failed ones are none of them."""
    known = [member for member in members if member.status == "done" and member.error is not None and member.error >= 0]
    return sorted(known, key=lambda member: (member.error, member.index))


def errors_of(members: Sequence[Member]) -> Floats:
    """The errors of the finished members, sorted: [n]."""
    return np.array([member.error for member in finished(members)], np.float64)


def count_statuses(members: Sequence[Member]) -> dict[Status, int]:
    """How many members are in each status."""
    return {status: sum(member.status == status for member in members) for status in get_args(Status)}


def progress(members: Sequence[Member]) -> str:
    """Such as "18 of 25 done, 2 failed, 1 pruned, 4 waiting"."""
    counts = count_statuses(members)
    order: tuple[Status, ...] = ("failed", "pruned", "running", "waiting")
    others = [f"{counts[status]} {status}" for status in order if counts[status]]
    unknown = counts["done"] - len(finished(members))
    without = [f"{unknown} done without an error rate"] if unknown else []
    return ", ".join([f"{counts['done']} of {len(members)} done", *without, *others])


def distribution(errors: Floats, seed: int = 0) -> Distribution:
    """The distribution function of errors [n] with a pointwise band."""
    ordered, repeats = np.unique(errors, return_counts=True)
    count = len(errors)
    if not count:
        return Distribution(ordered, ordered, ordered, ordered, 0)
    resampled = np.random.default_rng(seed).multinomial(count, repeats / count, RESAMPLES)
    low, high = np.percentile(np.cumsum(resampled, axis=1) / count, _PERCENTILES, axis=0)
    if count < _FEWEST:
        low, high = np.full((2, len(ordered)), math.nan)
    return Distribution(ordered, np.cumsum(repeats) / count, low, high, count)


def summarize(errors: Floats, seed: int = 0) -> Summary:
    """Mean, minimum and median of errors [n]."""
    if not len(errors):
        return Summary(0, *(Interval(math.nan) for _ in range(3)))
    resampled = _resample(errors, np.random.default_rng(seed))
    found = [_interval(float(of(errors)), of(resampled, axis=1)) for of in (np.mean, np.min, np.median)]
    return Summary(len(errors), *(found if len(errors) >= _FEWEST else (Interval(one.value) for one in found)))


def compare(first: Floats, second: Floats, seed: int = 0) -> Comparison:
    """Compare two samples of errors, [n] and [m]."""
    counts = len(first), len(second)
    if not min(counts):
        return Comparison(counts, Interval(math.nan), math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    differences = _resample(second, rng).mean(axis=1) - _resample(first, rng).mean(axis=1)
    observed = float(second.mean() - first.mean())
    # Under the hypothesis, both means are equal: the bootstrap's differences, moved to a mean of zero.
    extreme = np.count_nonzero(np.abs(differences - observed) >= abs(observed) - 1e-12)
    test = stats.ks_2samp(first, second)
    mean_p = (1 + extreme) / (1 + RESAMPLES)
    return Comparison(counts, _interval(observed, differences), mean_p, float(test.statistic), float(test.pvalue))


def best_ranges(
    errors: Floats, columns: Mapping[str, Floats], seed: int = 0, share: float = 0.25
) -> dict[str, BestRange]:
    """The empirical bootstrap: for each property, the median and the 95% range of its values in the best networks.

    The best one of `share` of the networks, but at least two, that are drawn with replacement: its distribution is
    computed rather than simulated. Columns are [n] as errors are, NaN in networks without that property; properties
    of fewer than two networks are left out.

    Even if a property does not matter, this range is narrower than that of all networks, as few of them are the best.
    So the test asks how many networks lie in it, and how many do when errors are permuted among the networks.
    """
    known = {name: np.isfinite(column) for name, column in columns.items()}
    return {
        name: _best_range(columns[name][chosen], errors[chosen], np.random.default_rng(seed), share)
        for name, chosen in known.items()
        if np.count_nonzero(chosen) > 1
    }


def _best_range(values: Floats, errors: Floats, rng: np.random.Generator, share: float) -> BestRange:
    count = len(values)
    # P(the best of the drawn networks has at least this rank) = P(each of them has).
    at_least = (np.arange(count, -1, -1) / count) ** max(2, round(share * count))
    weights = np.empty(count)
    weights[np.argsort(errors, kind="stable")] = at_least[:-1] - at_least[1:]
    order = np.argsort(values, kind="stable")
    ordered, weights = values[order], weights[order]
    best = _weighted_range(ordered, weights)
    permuted = _weighted_range(ordered, rng.permuted(np.tile(weights, (RESAMPLES, 1)), axis=1))
    covered, of_chance = _count_between(ordered, best), _count_between(ordered, permuted)
    p = (1 + np.count_nonzero(of_chance <= covered)) / (1 + RESAMPLES)
    low, middle, high = best.tolist()
    all_low, all_middle, all_high = _weighted_range(ordered, np.full(count, 1 / count)).tolist()
    sampled = Interval(all_middle, all_low, all_high)
    return BestRange(count, Interval(middle, low, high), sampled, int(covered), p)


def _weighted_range(ordered: Floats, weights: Floats) -> Floats:
    """The 2.5, 50 and 97.5 percentiles [3, ...] of rising values [n] with weights [..., n]: some of these values."""
    cumulative = np.cumsum(weights, axis=-1)
    quantiles = (_PERCENTILES[0], 50, _PERCENTILES[1])
    return ordered[np.stack([np.argmax(cumulative >= q / 100 - 1e-12, axis=-1) for q in quantiles])]


def _count_between(ordered: Floats, ends: Floats) -> NDArray[np.int64]:
    """How many of the rising values [n] lie between the outer two of `ends` [3, ...], both included."""
    return np.searchsorted(ordered, ends[2], "right") - np.searchsorted(ordered, ends[0], "left")


def correlate(cost: Floats, seconds: Floats, seed: int = 0) -> Correlation:
    """Correlation of seconds [n] with a cost [n], both positive; NaN where a value is not known.

    It is NaN for fewer than 5 networks and if one of the two is constant.
    """
    known = (cost > 0) & (seconds > 0)
    x, y = np.log(cost[known]), np.log(seconds[known])
    count = len(x)
    if count < _FEWEST or not np.ptp(x) or not np.ptp(y):
        return Correlation(count, Interval(math.nan), Interval(math.nan))
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    pearson = _interval(float(_pearson(x, y)), _pearson(x[drawn], y[drawn]))
    ranks = [stats.rankdata(values, axis=-1) for values in (x, y, x[drawn], y[drawn])]
    spearman = _interval(float(_pearson(ranks[0], ranks[1])), _pearson(ranks[2], ranks[3]))
    return Correlation(count, pearson, spearman)


def pareto_front(cost: Floats, errors: Floats) -> NDArray[np.int64]:
    """Which networks no other one beats: rising in cost, falling in error. Both are [n], NaN where not known."""
    known = np.flatnonzero(np.isfinite(cost) & np.isfinite(errors))
    order = known[np.lexsort((errors[known], cost[known]))]
    lowest_before = np.minimum.accumulate(np.concatenate([[math.inf], errors[order]]))[:-1]
    return order[errors[order] < lowest_before]


def _resample(values: Floats, rng: np.random.Generator) -> Floats:
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))]


def _interval(value: float, resampled: Any) -> Interval:
    """Resamples without a value, such as correlations of a constant, are passed over."""
    low, high = np.nanpercentile(resampled, _PERCENTILES)
    return Interval(value, float(low), float(high))


def _pearson(x: Any, y: Any) -> Any:
    """Over the last axis; NaN for a constant."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    scale = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    return np.divide((x * y).sum(axis=-1), scale, out=np.full_like(scale, math.nan), where=scale > 1e-12)
