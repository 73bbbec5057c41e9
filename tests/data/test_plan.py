import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import DataConfig
from distrain.data.sampling.lanes import LaneLayout
from distrain.data.sampling.order import BalancedOrder, GlobalOrder, RepeatedOrder, WindowOrder, make_order
from distrain.data.sampling.plan import Plan
from distrain.data.storage.index_file import load_index
from distrain.errors import UserError

seeds = st.integers(0, 2**63)
lane_counts, lane_sizes = st.integers(1, 7), st.integers(2, 9)
shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def shards(sizes):
    return np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)


@st.composite
def plans(draw):
    """Any data set, lanes and seed with a global or a window shuffle."""
    sizes, seed = draw(shard_sizes), draw(seeds)
    layout = LaneLayout(sum(sizes), draw(lane_counts), draw(lane_sizes))
    windowed = [WindowOrder(shards(sizes), layout, window_shards, seed) for window_shards in (1, 3)]
    return Plan(layout, 3.0, draw(st.sampled_from([GlobalOrder(sum(sizes), seed), *windowed])))


@given(plans())
def test_every_epoch_holds_every_sample_once(plan):
    samples, lanes = plan.layout.samples, plan.layout.lanes
    steps = -(-3 * samples // plan.batch)  # enough to end three epochs
    seen = Counter(
        (int(epoch), int(sample))
        for step in range(steps)
        for lane in range(lanes)
        for sample, epoch, _ in zip(*plan.lane_batch(step, lane), strict=True)
    )
    whole = {(epoch, sample): 1 for epoch in range(3) for sample in range(samples)}
    assert {key: count for key, count in seen.items() if key[0] < 3} == whole
    assert sum(seen.values()) == steps * plan.batch


@given(plans(), st.integers(0, 40), st.integers(0, 10**6))
def test_samples_do_not_depend_on_which_were_requested_before(plan, start, lane):
    """A resumed run starts with the samples that the uninterrupted run reaches."""
    lane %= plan.layout.lanes
    stream_pos = np.arange(start, start + 3 * plan.layout.per_lane)
    at_once = plan.lane_samples(lane, stream_pos)
    one_by_one = [plan.lane_samples(lane, stream_pos[i : i + 1]) for i in reversed(range(len(stream_pos)))]
    for column in range(3):
        assert at_once[column].tolist() == [single[column][0] for single in reversed(one_by_one)]


@given(st.integers(1, 200), lane_counts, lane_sizes, st.integers(0, 6))
def test_positions_in_an_epoch_and_in_a_lane_correspond(samples, lanes, per_lane, epoch):
    """Every position of an epoch belongs to one lane, and each lane's share is numbered from 0 without gaps."""
    layout = LaneLayout(samples, lanes, per_lane)
    lane_of, lane_pos = layout.to_lanes(epoch, np.arange(samples))
    shares = [layout.share(epoch, lane) for lane in range(lanes)]
    assert [position for share in shares for position in share] == list(range(samples))
    assert [lane_pos[lane_of == lane].tolist() for lane in range(lanes)] == [list(range(len(s))) for s in shares]


@given(st.integers(1, 200), lane_counts, lane_sizes, seeds, st.integers(0, 30), st.integers(1, 4))
def test_the_global_order_does_not_depend_on_the_lanes(samples, lanes, per_lane, seed, step, factor):
    """Twice as many lanes of half the size consume the same global batches."""
    wide = Plan(LaneLayout(samples, lanes * factor, per_lane), 1, GlobalOrder(samples, seed))
    deep = Plan(LaneLayout(samples, lanes, per_lane * factor), 1, GlobalOrder(samples, seed))
    np.testing.assert_array_equal(global_batch(wide, step), global_batch(deep, step))


def global_batch(plan, step):
    return np.concatenate([plan.lane_batch(step, lane).ids for lane in range(plan.layout.lanes)])


@pytest.mark.parametrize(
    "make",
    [
        lambda layout, seed: GlobalOrder(1000, seed),
        lambda layout, seed: WindowOrder(shards([100] * 10), layout, 2, seed),
    ],
    ids=["global", "window"],
)
def test_epochs_and_seeds_are_shuffled_differently(make):
    orders, layout = [], LaneLayout(1000, 4, 25)
    for seed in (0, 1):
        plan = Plan(layout, 2, make(layout, seed))
        for epoch in (0, 1):
            steps = range(epoch * 10, epoch * 10 + 10)
            orders.append(np.concatenate([global_batch(plan, step) for step in steps]))
    for a in range(4):
        assert sorted(orders[a]) == list(range(1000))
        for b in range(a):
            assert np.mean(orders[a] == orders[b]) < 0.02


def test_a_window_shuffle_reads_few_shards_at_a_time_and_mixes_them():
    shard = shards([50] * 40)
    layout = LaneLayout(2000, 2, 20)
    plan = Plan(layout, 1, WindowOrder(shard, layout, 10, 0))
    for lane in range(2):
        steps = [shard[plan.lane_batch(step, lane).ids] for step in range(50)]
        assert len(set(np.concatenate(steps))) == 20  # half of the shards each
        for window in (steps[:25], steps[25:]):
            assert len(set(np.concatenate(window))) == 10
        assert np.mean([len(set(step)) for step in steps]) > 7  # of 10, in a batch of 20


@given(st.integers(1, 60), st.integers(1, 30), lane_counts, st.integers(1, 12), seeds)
def test_windows_have_equal_sizes_of_at_least_the_configured_shards(count, samples, lanes, window_shards, seed):
    """If a lane's share has as many shards as a window, it mixes at least that many at any time."""
    shard = shards([samples] * count)
    layout = LaneLayout(len(shard), lanes, 2)
    plan = Plan(layout, 1, WindowOrder(shard, layout, window_shards, seed))
    size = len(layout.share(0, 0))
    order = plan.lane_samples(0, np.arange(size)).ids
    windows = max(1, size // (window_shards * samples))
    bounds = [size * number // windows for number in range(windows + 1)]
    in_windows = [set(shard[order[first:end]]) for first, end in pairwise(bounds)]
    assert min(len(mixed) for mixed in in_windows) >= min(window_shards, size // samples)
    assert sum(len(one & other) for one, other in pairwise(in_windows)) <= windows - 1  # a shard is split once at most


def test_windows_of_too_few_shards_are_rejected(dataset):
    data, index = DataConfig(shuffle="window", window_shards=4), load_index(f"{dataset}/train.parquet")
    layout = LaneLayout(len(index), 2, 2)
    with pytest.raises(UserError, match=r"^data\.window_shards=4 mixes too few shards: set at least 5"):
        make_order(data, index, layout, 0)
    make_order(replace(data, window_shards=5), index, layout, 0)


@pytest.mark.parametrize(
    ("options", "root", "order"),
    [
        ({}, "/data", GlobalOrder),
        ({}, "s3://bucket", WindowOrder),
        ({"shuffle": "global"}, "s3://bucket", GlobalOrder),
        ({"shuffle": "window"}, "/data", WindowOrder),
        ({"repeats": 2}, "s3://bucket", RepeatedOrder),
        ({"balanced": True}, "s3://bucket", BalancedOrder),
    ],
    ids=str,
)
def test_samples_are_read_in_the_order_that_suits_their_store(dataset, options, root, order):
    index = replace(load_index(f"{dataset}/train.parquet"), root=root)
    assert isinstance(make_order(DataConfig(**options), index, LaneLayout(len(index), 2, 2), 0), order)


SAMPLES = 1_281_167


@pytest.mark.parametrize(
    "make",
    [
        lambda layout: GlobalOrder(SAMPLES, 0),
        lambda layout: WindowOrder(shards_of_imagenet(), layout, 10, 0),
        lambda layout: RepeatedOrder(SAMPLES, 0, 3),
        lambda layout: BalancedOrder(np.arange(SAMPLES, dtype=np.int32) % 1000, 0),
    ],
    ids=["global", "window", "repeated", "balanced"],
)
def test_planning_imagenet_takes_less_than_64_megabytes(make):
    """In a process that executes all lanes, over three epochs."""
    layout = LaneLayout(SAMPLES, 1, 256)
    plan = Plan(layout, 3, make(layout))
    tracemalloc.start()
    for epoch in range(3):
        plan.lane_batch(plan.step_at(epoch), 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6


def shards_of_imagenet():
    return np.repeat(np.arange(570), -(-SAMPLES // 570))[:SAMPLES].astype(np.int32)


def test_all_repeats_of_a_sample_are_in_one_batch():
    plan = Plan(LaneLayout(90, 3, 4), 1, RepeatedOrder(90, 0, 3))
    for step in range(7):
        ids, _, repeat_index = (
            np.concatenate(column) for column in zip(*(plan.lane_batch(step, lane) for lane in range(3)), strict=True)
        )
        assert sorted(Counter(ids.tolist()).values()) == [3, 3, 3, 3]
        assert sorted(repeat_index.tolist()) == sorted([0, 1, 2] * 4)


def test_a_balanced_epoch_draws_all_classes_equally_often_and_numbers_its_repeats():
    labels = np.repeat([0, 1, 2], [100, 40, 10]).astype(np.int32)
    plan = Plan(LaneLayout(150, 1, 50), 1, BalancedOrder(labels, 0))
    ids, _, repeat_index = (
        np.concatenate(c) for c in zip(*(plan.lane_batch(step, 0) for step in range(3)), strict=True)
    )
    assert np.bincount(labels[ids]).tolist() == [50, 50, 50]
    assert len(set(zip(ids, repeat_index, strict=True))) == 150
    assert set(Counter(ids[labels[ids] == 2].tolist()).values()) == {5}
    later = np.concatenate([plan.lane_batch(step, 0).ids for step in range(3, 6)])
    assert set(ids[labels[ids] == 0]) != set(later[labels[later] == 0])


def plan_of(samples, lanes, per_lane, epochs):
    return Plan(LaneLayout(samples, lanes, per_lane), epochs, GlobalOrder(samples, 0))


def test_steps_are_epochs_times_samples_over_batch_rounded():
    assert plan_of(50_000, 2, 32, 2).steps == 1562  # 1562.5, half to even
    assert plan_of(203, 3, 4, 3).steps == 51  # 50.75
    assert plan_of(10, 8, 32, 1).steps == 1


def test_boundaries_are_every_given_number_of_epochs_and_the_end():
    assert plan_of(100, 2, 5, 2.5).steps_every(1) == {10, 20, 25}
    assert plan_of(100, 2, 5, 1).steps_every(0.5) == {5, 10}
    assert plan_of(100, 2, 5, 1).steps_every(3) == {10}
