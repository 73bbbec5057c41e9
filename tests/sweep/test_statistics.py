"""Statistics of populations whose answers are known."""

import math

import numpy as np
import pytest
from support.populations import member

from distrain.models import network_config
from distrain.models.regnet_widths import quantize_widths
from distrain.sweep.statistics import (
    best_ranges,
    compare,
    correlate,
    distribution,
    errors_of,
    pareto_front,
    progress,
    summarize,
)
from distrain.sweep.structure import block_widths, fit_linear_rule, property_columns


def test_the_distribution_function_is_the_fraction_of_smaller_errors():
    found = distribution(np.array([0.3, 0.1, 0.2, 0.2]))
    assert [found.at(error) for error in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)] == [0, 0, 0.25, 0.25, 0.75, 0.75, 1]
    assert (found.errors == [0.1, 0.2, 0.3]).all()


def test_the_band_of_the_distribution_function_is_the_binomial_one():
    found = distribution(np.linspace(0.2, 0.5, 100))
    middle = 49  # 50 of 100 networks are at most as bad: Binomial(100, 0.5) has its 2.5 and 97.5 percentiles at 40, 60
    assert found.fraction[middle] == pytest.approx(0.5)
    assert (found.low[middle], found.high[middle]) == pytest.approx((0.40, 0.60), abs=0.011)


def test_only_finished_members_have_an_error():
    others = [member(9, 0.01, status="pruned"), member(8, 0.02, status="failed"), member(7), member(6, math.nan)]
    members = [member(0, 0.3), *others, member(1, 0.2)]
    assert errors_of(members).tolist() == [0.2, 0.3]
    assert progress(members) == "3 of 6 done, 1 done without an error rate, 1 failed, 1 pruned, 1 waiting"


def test_intervals_of_the_mean_agree_with_theory_and_depend_on_the_seed_only():
    errors = np.random.default_rng(1).normal(0.4, 0.02, 400)
    found = summarize(errors, seed=3)
    assert (found.mean.low, found.mean.high) == pytest.approx(errors.mean() + np.array([-1, 1]) * 0.00196, abs=2.5e-4)
    assert found.median.low < np.median(errors) < found.median.high
    assert found.min.value == found.min.low == errors.min()
    assert found == summarize(errors, seed=3) != summarize(errors, seed=4)


def test_fewer_than_five_networks_have_no_interval():
    found = summarize(np.array([0.25, 0.35, 0.36, 0.36]))
    assert found.mean.value == pytest.approx(0.33)
    assert math.isnan(found.mean.low)
    assert np.isnan(distribution(np.array([0.25, 0.35, 0.36, 0.36])).low).all()
    assert summarize(np.array([0.25, 0.35, 0.36, 0.36, 0.37])).mean.low < 0.33


def test_a_known_shift_between_spaces_is_found():
    rng = np.random.default_rng(5)
    worse, better = rng.normal(0.40, 0.01, 40), rng.normal(0.38, 0.01, 30)
    found = compare(worse, better)
    assert found.difference.low < -0.02 < found.difference.high < 0
    assert found.mean_p < 0.001
    sentence = found.sentence("any", "reg")
    assert sentence.startswith("any and reg: the mean error of reg is ")
    assert " points lower" in sentence
    assert compare(better, worse).sentence("reg", "any").startswith("reg and any: the mean error of reg is ")


def test_equal_spaces_give_no_evidence_of_a_difference_at_the_nominal_rate():
    rng = np.random.default_rng(6)
    found = [compare(*rng.normal(0.4, 0.02, (2, 25))) for _ in range(100)]
    assert sum(one.mean_p < 0.05 for one in found) <= 11  # 5 are expected, 11 is the 99.5th percentile
    calm = next(one for one in found if min(one.mean_p, one.ks_p) > 0.05)
    assert calm.sentence("a", "b").startswith("a and b: no evidence of a difference at n=25 and 25 (means: p=")


def test_too_few_networks_are_not_compared():
    assert "too few networks to compare at n=2 and 25" in compare(np.ones(2), np.zeros(25)).sentence("a", "b")
    assert "too few networks to compare at n=0 and 25" in compare(np.ones(0), np.zeros(25)).sentence("a", "b")


def test_the_empirical_bootstrap_finds_a_planted_parameter():
    rng = np.random.default_rng(7)
    depth, noise = rng.integers(8, 33, 200).astype(float), rng.uniform(8, 32, 200)
    ranges = best_ranges(0.3 + 0.01 * np.abs(depth - 20), {"depth": depth, "noise": noise})
    depth, noise = ranges["depth"], ranges["noise"]
    assert depth.best.value == 20
    assert 18 <= depth.best.low <= depth.best.high <= 22
    assert (depth.sampled.low, depth.sampled.high) == pytest.approx((8, 32), abs=1)
    assert depth.verdict == "narrower than the sampled range"
    assert noise.best.high - noise.best.low > 8
    assert noise.verdict == "not distinguishable from the sampled range"


def test_a_property_that_does_not_matter_differs_at_the_nominal_rate():
    rng = np.random.default_rng(9)
    columns = {str(i): rng.uniform(8, 32, 40) for i in range(100)} | {
        f"c{i}": rng.choice([1.0, 2, 4], 40) for i in range(9)
    }
    found = best_ranges(rng.normal(0.4, 0.02, 40), columns)
    assert sum(found[str(i)].differs for i in range(100)) <= 11  # 5 are expected, 11 is the 99.5th percentile
    assert not all(one.differs for name, one in found.items() if name.startswith("c"))


def test_a_planted_choice_is_found_and_a_constant_is_none():
    rng = np.random.default_rng(10)
    ratio = rng.choice([1.0, 2, 4], 60)
    found = best_ranges(0.3 + 0.05 * np.log2(ratio) + rng.normal(0, 0.01, 60), {"ratio": ratio, "same": np.ones(60)})
    assert (found["ratio"].best.low, found["ratio"].best.high) == (1, 1)
    assert found["ratio"].covered == np.count_nonzero(ratio == 1)
    assert found["ratio"].p < 0.01
    assert found["same"].verdict == "the same in all networks"
    assert not found["same"].differs


def test_the_range_of_three_networks_is_never_a_finding():
    found = best_ranges(np.array([0.1, 0.2, 0.3]), {"depth": np.array([20.0, 40.0, 60.0])})["depth"]
    assert found.count == 3
    assert not found.differs


def test_the_empirical_bootstrap_keeps_the_best_of_a_quarter():
    errors = np.linspace(0.1, 0.9, 8)
    best = best_ranges(errors, {"rank": np.arange(8.0)})["rank"].best
    # The better of 2 out of 8 with replacement: P(rank >= k) = ((8 - k) / 8)^2.
    assert (best.low, best.value, best.high) == (0, 2, 6)


def test_properties_that_a_network_lacks_do_not_count():
    columns = {"known": np.array([math.nan, 5.0, 6.0]), "once": np.array([1.0, math.nan, math.nan])}
    found = best_ranges(np.array([0.1, 0.2, 0.3]), columns)
    assert {name: (one.best.value, one.count) for name, one in found.items()} == {"known": (5, 2)}


@pytest.mark.parametrize("name", ["regnetx_200mf", "regnetx_8gf", "regnety_12gf", "regnety_128gf"])
def test_the_linear_rule_fits_regnets_exactly(name):
    config = network_config(name)
    widths = quantize_widths(config.depth, config.w0, config.wa, config.wm)
    found = fit_linear_rule(widths)
    assert found.error == 0
    assert (quantize_widths(config.depth, found.w0, found.wa, found.wm) == widths).all()
    built = np.repeat([stage.width for stage in config.stages()], [stage.depth for stage in config.stages()])
    assert fit_linear_rule(built).error < 0.06  # widths are rounded to multiples of the group width


def test_the_linear_rule_does_not_fit_falling_widths():
    assert fit_linear_rule(np.repeat([512, 256, 128, 64], 4)).error > 0.5


def test_properties_hold_costs_depth_and_fit_of_any_network():
    stages = [{"depth": 2, "width": 64}, {"depth": 3, "width": 128}]
    anynet = member(
        0, 0.3, network="anynet", options={"stages": stages}, parameters={"width.1": 64, "kind": "x", "preact": True}
    )
    dense = member(
        1, 0.3, network="densenet", options={"depths": [6, 12], "growth_rate": 12, "stem_width": 16}, parameters={}
    )
    columns = property_columns([anynet, dense])
    assert list(columns) == ["width.1", "blocks", "fit_error", "flops", "params", "activations"]
    assert columns["blocks"].tolist() == [5, 18]
    assert math.isnan(columns["width.1"][1])
    assert block_widths(anynet).tolist() == [64, 64, 128, 128, 128]
    assert block_widths(dense) is None
    assert set(property_columns([member(2, 0.3, seconds=0.1)])) > {"depth", "seconds"}


@pytest.mark.filterwarnings("error")
def test_the_correlation_of_time_and_cost_needs_five_times():
    cost = np.array([1e6, 2e6, 4e6, 8e6, 16e6])
    found = correlate(cost, 3e-8 * cost**0.9)
    assert (found.pearson.value, found.spearman.value) == pytest.approx((1, 1))
    some = correlate(cost, np.array([0.1, math.nan, 0.4, 0.3, 0.2]))
    assert some.count == 4
    assert math.isnan(some.pearson.value)
    assert math.isnan(correlate(np.full(5, 2.0), cost).spearman.value)


def test_the_interval_of_a_correlation_holds_that_of_the_population():
    rng = np.random.default_rng(8)
    x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 200).T
    found = correlate(np.exp(x), np.exp(y))
    assert found.pearson.low < 0.6 < found.pearson.high < 0.8
    assert found.spearman.low < 0.58 < found.spearman.high < 0.8


def test_the_pareto_front_holds_what_no_other_network_beats():
    cost = np.array([3.0, 1.0, 2.0, 2.0, 4.0, math.nan])
    errors = np.array([0.3, 0.5, 0.4, 0.2, 0.2, 0.1])
    assert pareto_front(cost, errors).tolist() == [1, 3]
