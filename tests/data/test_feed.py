"""How the data plane is put together for a run: the choice of a loader, and what is announced to the store."""

import heapq
import re
import sys
from collections import Counter, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain import config
from distrain.config import BatchConfig, Config, DataConfig, RunConfig, ScheduleConfig, TrainConfig
from distrain.data.index import Index, Shard
from distrain.data.loading import feed
from distrain.data.loading.feed import choose_loader, make_plan, train_requests, validation_requests
from distrain.data.loading.loader import Batch
from distrain.data.loading.reader import SampleReader
from distrain.data.storage.index_file import load_index
from distrain.errors import UserError
from distrain.parallel.group import Group

CPU = torch.device("cpu")
PER_LANE = 4


@pytest.fixture
def built(dataset):
    return load_index(f"{dataset}/train.parquet")


@pytest.fixture
def configure(tmp_path, on_dataset):
    """configure(key=value, ...) of a run with two lanes."""

    def make(*overrides):
        run = ("run.name=run", f"run.dir={tmp_path}", "model.name=densenet_bc_10_4", "train.epochs=5")
        batch = ("batch.lanes=2", f"batch.per_lane={PER_LANE}")
        return config.load(None, [*run, *batch, "schedule.warmup_epochs=0", *on_dataset, *overrides])

    return make


class Clock:
    """Stands in for the module `time`, and moves only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class Simulated:
    """A loader whose threads take `seconds` of a clock for every batch, and one more for the first of all.

    They work ahead as far as TorchLoader's do.
    """

    def __init__(self, data, seconds, clock):
        self._free = [clock.now] * data.threads  # when each thread is
        self._ahead = max(data.prefetch, data.threads)
        self._seconds = seconds
        self._opening = 1.0
        self._clock = clock

    def stream(self, requests):
        ready = deque()
        for _ in requests:
            begin = max(heapq.heappop(self._free), self._clock.now)
            end = begin + self._seconds + self._opening
            self._opening = 0.0
            heapq.heappush(self._free, end)
            ready.append(end)
            if len(ready) > self._ahead:
                self._clock.now = max(self._clock.now, ready.popleft())
                yield Batch(torch.zeros(PER_LANE), torch.zeros(PER_LANE))

    def close(self):
        pass


@pytest.fixture
def choose(built, monkeypatch):
    """Chooses among loaders that take so many seconds for a batch. Returns the choice and what was said of it."""
    clock = Clock()
    monkeypatch.setattr(feed, "time", clock)

    def choose_for(run, **seconds):
        def make(run, name, built, quarantine, device):
            return Simulated(run.data, seconds[name], clock)

        said = []
        monkeypatch.setattr(feed, "make_loader", make)
        return choose_loader(run, make_plan(run, built), built, CPU, said.append), said

    return choose_for


@pytest.mark.parametrize(("torch_seconds", "dali_seconds", "faster"), [(0.02, 0.04, "torch"), (0.04, 0.02, "dali")])
def test_the_faster_loader_is_chosen_and_told_and_kept(choose, configure, torch_seconds, dali_seconds, faster):
    chosen, said = choose(configure(), torch=torch_seconds, dali=dali_seconds)
    assert chosen == faster
    (line,) = said
    assert line.startswith(f"data.loader=auto: {faster}, of torch ")
    assert choose(configure(), torch=dali_seconds, dali=torch_seconds) == (faster, [])


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 8), (3, 4), (16, 1)])
def test_what_was_made_ahead_is_not_taken_for_speed(choose, configure, threads, prefetch):
    _, (line,) = choose(configure(f"data.threads={threads}", f"data.prefetch={prefetch}"), torch=0.03, dali=0.04)
    told = float(re.search(r"of torch ([\d,]+) images/s", line)[1].replace(",", ""))
    assert told == pytest.approx(threads * PER_LANE / 0.03, rel=0.01)


def test_a_configured_loader_is_taken_untried(choose, configure):
    assert choose(configure("data.loader=torch")) == ("torch", [])


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


def test_without_dali_auto_takes_torch_and_says_why(choose, configure, no_dali):
    chosen, (line,) = choose(configure())
    assert (chosen, line) == ("torch", "data.loader=auto: torch, because NVIDIA DALI is not installed")


def test_asking_for_dali_where_there_is_none_is_one_line(choose, configure, no_dali):
    with pytest.raises(
        UserError, match=r"^data\.loader=dali needs NVIDIA DALI, .*: install nvidia-dali-cuda130 or set"
    ):
        choose(configure("data.loader=dali"))


def test_a_run_that_chose_dali_does_not_go_on_without_it(choose, configure, monkeypatch):
    choose(configure(), torch=0.02, dali=0.01)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"^data\.loader=dali needs NVIDIA DALI"):
        choose(configure())


class Listening:
    """A store that counts how often it is told of each shard."""

    def __init__(self, built):
        self.built = built
        self.told = Counter()

    def prefetch(self, samples):
        self.told.update(self.built.shard[samples].tolist())


def remote(*sizes):
    """The index of shards with so many samples each."""
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


def told_before_the_first(built, requests):
    """How many samples of each shard the store knows of when the first batch is to be made."""
    store = Listening(built)
    next(SampleReader(built, store, None).prefetch_ahead(requests))
    return store.told


@pytest.mark.parametrize("lanes", [range(0, 1), range(1, 4), range(8)])
def test_the_shards_of_a_window_are_announced_for_each_lane_of_a_rank(configure, lanes):
    built = remote(*[50] * 160)
    run = configure("batch.lanes=8")
    told = told_before_the_first(built, train_requests(run, make_plan(run, built), built, lanes))
    assert 10 * len(lanes) <= len(told) <= (11 + PER_LANE) * len(lanes)  # and a batch of the next window
    assert sum(told.values()) == pytest.approx(500 * len(lanes), abs=PER_LANE * len(lanes))


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("batch", [16, 256])
def test_validation_announces_as_many_shards_whatever_its_batch_and_ranks(configure, batch, world):
    built = remote(*[50] * 400)
    requests = validation_requests(configure(f"evaluate.batch={batch}"), built, range(0, 80, world))
    told = told_before_the_first(built, requests)
    assert max(told) == pytest.approx(10, abs=1 + batch * world / 50)


def test_nothing_is_announced_ahead_of_local_reads(configure, built):
    run = configure(f"evaluate.batch={PER_LANE}")
    for requests in (
        train_requests(run, make_plan(run, built), built, range(2)),
        validation_requests(run, built, range(9)),
    ):
        assert sum(told_before_the_first(built, requests).values()) == PER_LANE


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=25),
    shuffle=st.sampled_from(["global", "window"]),
    lanes=st.integers(1, 7),
    per_lane=st.integers(2, 5),
    world=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
    start=st.integers(0, 60),
)
def test_all_ranks_together_decode_the_tail_of_the_epochs_whatever_their_number(
    sizes, shuffle, lanes, per_lane, world, seed, start
):
    built = remote(*sizes)
    run = Config(
        run=RunConfig(name="run", seed=seed),
        data=DataConfig(shuffle=shuffle),
        batch=BatchConfig(lanes=lanes, per_lane=per_lane),
        train=TrainConfig(epochs=3.0),
        schedule=ScheduleConfig(warmup_epochs=0),
    )
    plan = make_plan(run, built)
    alone = consumed(train_requests(run, plan, built, range(lanes)))
    steps = -(-2 * len(built) // plan.batch)
    seen = Counter(sample for step in alone[: steps * lanes] for sample in step if sample[0] < 2)
    assert seen == {(epoch, sample): 1 for epoch in range(2) for sample in range(len(built))}

    world, start = min(world, lanes), min(start, plan.steps)
    ranks = [Group(rank, world).lanes(lanes) for rank in range(world)]
    together = [consumed(train_requests(run, plan, built, own, start)) for own in ranks]
    tail = [
        batch
        for step in range(plan.steps - start)
        for own, batches in zip(ranks, together, strict=True)
        for batch in batches[step * len(own) : (step + 1) * len(own)]
    ]
    assert tail == alone[start * lanes :]
    assert sum(map(len, together)) == len(tail)


def consumed(requests):
    """The (epoch, sample) pairs of each request."""
    return [list(zip(*(request.samples[key].tolist() for key in (1, 0)), strict=True)) for request in requests]
