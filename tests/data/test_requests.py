"""Requests: what a rank decodes, and what the store prefetches for it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.config import BatchConfig, Config, DataConfig, RunConfig, ScheduleConfig, TrainConfig
from distrain.data.index import Index, Shard
from distrain.data.loading.reader import SampleReader
from distrain.data.loading.requests import train_requests, validation_requests
from distrain.data.loading.setup import make_plan
from distrain.parallel.group import Group

PER_LANE = 4  # in `configure`


class CountingStore:
    """Counts the samples of each shard that it is asked to prefetch."""

    def __init__(self, index):
        self.index = index
        self.prefetched = Counter()

    def prefetch(self, samples):
        self.prefetched.update(self.index.shard[samples].tolist())


def remote_index(*sizes):
    """The index of remote shards with `sizes` samples."""
    zeros = np.zeros(sum(sizes), np.int32)
    return Index(
        root="http://127.0.0.1",
        shards=tuple(Shard(f"{number}.tar", 1, 0) for number in range(len(sizes))),
        classes=("a",),
        shard=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        offset=zeros.astype(np.int64),
        size=zeros,
        label=zeros,
        width=zeros + 8,
        height=zeros + 8,
        crc32=zeros.astype(np.uint32),
    )


def prefetched_before_the_first(index, requests):
    """Samples per shard that are prefetched before the first batch is decoded."""
    store = CountingStore(index)
    next(SampleReader(index, store, None).prefetch_ahead(requests))
    return store.prefetched


def test_a_bad_sample_is_replaced_by_the_next_of_its_lane_and_both_are_augmented(configure):
    index = remote_index(*[50] * 4)
    run = configure("batch.lanes=2")
    plan = make_plan(run, index)
    request = next(iter(train_requests(run, plan, index, range(1, 2))))
    replacement = request.replacement(1)
    assert replacement.samples.ids.tolist() == request.samples.ids[2:3].tolist()
    assert request.augmented
    assert replacement.augmented
    assert not next(iter(validation_requests(run, index, range(1)))).augmented


@pytest.mark.parametrize("lanes", [range(0, 1), range(1, 4), range(8)])
def test_a_rank_prefetches_one_window_of_shards_per_lane(configure, lanes):
    index = remote_index(*[50] * 160)
    run = configure("batch.lanes=8")
    prefetched = prefetched_before_the_first(index, train_requests(run, make_plan(run, index), index, lanes))
    assert 10 * len(lanes) <= len(prefetched) <= (11 + PER_LANE) * len(lanes)  # and a batch of the next window
    assert sum(prefetched.values()) == pytest.approx(500 * len(lanes), abs=PER_LANE * len(lanes))


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("batch", [16, 256])
def test_validation_prefetches_equally_many_shards_for_any_batch_and_ranks(configure, batch, world):
    index = remote_index(*[50] * 400)
    requests = validation_requests(configure(f"evaluate.batch={batch}"), index, range(0, 80, world))
    prefetched = prefetched_before_the_first(index, requests)
    assert max(prefetched) == pytest.approx(10, abs=1 + batch * world / 50)


def test_nothing_is_prefetched_ahead_of_local_reads(configure, train_index):
    run = configure(f"evaluate.batch={PER_LANE}")
    for requests in (
        train_requests(run, make_plan(run, train_index), train_index, range(2)),
        validation_requests(run, train_index, range(9)),
    ):
        assert sum(prefetched_before_the_first(train_index, requests).values()) == PER_LANE


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=25),
    shuffle=st.sampled_from(["global", "window"]),
    lanes=st.integers(1, 7),
    per_lane=st.integers(2, 5),
    world=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 60),
)
def test_any_number_of_ranks_together_decode_the_rest_of_the_run(sizes, shuffle, lanes, per_lane, world, seed, start):
    index = remote_index(*sizes)
    run = Config(
        run=RunConfig(name="run", seed=seed),
        data=DataConfig(shuffle=shuffle),
        batch=BatchConfig(lanes=lanes, per_lane=per_lane),
        train=TrainConfig(epochs=3.0),
        schedule=ScheduleConfig(warmup_epochs=0),
    )
    plan = make_plan(run, index)
    single = consumed(train_requests(run, plan, index, range(lanes)))
    steps = -(-2 * len(index) // plan.batch)
    seen = Counter(sample for step in single[: steps * lanes] for sample in step if sample[0] < 2)
    assert seen == {(epoch, sample): 1 for epoch in range(2) for sample in range(len(index))}

    world, start = min(world, lanes), min(start, plan.steps)
    ranks = [Group(rank, world).lanes(lanes) for rank in range(world)]
    together = [consumed(train_requests(run, plan, index, mine, start)) for mine in ranks]
    tail = [
        batch
        for step in range(plan.steps - start)
        for mine, batches in zip(ranks, together, strict=True)
        for batch in batches[step * len(mine) : (step + 1) * len(mine)]
    ]
    assert tail == single[start * lanes :]
    assert sum(map(len, together)) == len(tail)


def consumed(requests):
    """Return the (epoch, sample) pairs of each request."""
    return [list(zip(*(request.samples[key].tolist() for key in (1, 0)), strict=True)) for request in requests]
