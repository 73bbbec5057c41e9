"""`data.loader=auto`: the choice of a loader by measurement."""

import heapq
import re
import sys
from collections import deque

import pytest
import torch

from distrain.data.loading import autotune
from distrain.data.loading.autotune import choose_loader
from distrain.data.loading.loader import Batch
from distrain.data.loading.setup import make_plan
from distrain.errors import UserError

CPU = torch.device("cpu")
PER_LANE = 4  # in `configure`


class Clock:
    """Replaces the module `time`. Its time changes only when a test sets it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class SimulatedLoader:
    """A loader whose threads take `seconds` of a clock for every batch, and one more for the first of all.

    They work as far ahead as those of TorchLoader.
    """

    def __init__(self, data, seconds, clock):
        self._idle_from = [clock.now] * data.threads  # per thread
        self._ahead = max(data.prefetch, data.threads)
        self._seconds = seconds
        self._startup = 1.0
        self._clock = clock

    def stream(self, requests):
        ready = deque()
        for _ in requests:
            begin = max(heapq.heappop(self._idle_from), self._clock.now)
            end = begin + self._seconds + self._startup
            self._startup = 0.0
            heapq.heappush(self._idle_from, end)
            ready.append(end)
            if len(ready) > self._ahead:
                self._clock.now = max(self._clock.now, ready.popleft())
                yield Batch(torch.zeros(PER_LANE), torch.zeros(PER_LANE))

    def close(self):
        pass


@pytest.fixture
def choose(train_index, monkeypatch):
    """choose(run, loader=seconds per batch, ...) -> the chosen loader and the lines printed."""
    clock = Clock()
    monkeypatch.setattr(autotune, "time", clock)

    def choose_for(run, **seconds):
        def make(run, name, index, quarantine, device):
            return SimulatedLoader(run.data, seconds[name], clock)

        lines = []
        monkeypatch.setattr(autotune, "make_loader", make)
        return choose_loader(run, make_plan(run, train_index), train_index, CPU, lines.append), lines

    return choose_for


@pytest.mark.parametrize(("torch_seconds", "dali_seconds", "faster"), [(0.02, 0.04, "torch"), (0.04, 0.02, "dali")])
def test_the_faster_loader_is_chosen_reported_and_kept(choose, configure, torch_seconds, dali_seconds, faster):
    chosen, lines = choose(configure(), torch=torch_seconds, dali=dali_seconds)
    assert chosen == faster
    (line,) = lines
    assert line.startswith(f"data.loader=auto: {faster} is the fastest (torch ")
    assert choose(configure(), torch=dali_seconds, dali=torch_seconds) == (faster, [])


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 8), (3, 4), (16, 1)])
def test_batches_decoded_ahead_do_not_count_as_throughput(choose, configure, threads, prefetch):
    _, (line,) = choose(configure(f"data.threads={threads}", f"data.prefetch={prefetch}"), torch=0.03, dali=0.04)
    reported = float(re.search(r"\(torch ([\d,]+) images/s", line)[1].replace(",", ""))
    assert reported == pytest.approx(threads * PER_LANE / 0.03, rel=0.01)


def test_a_configured_loader_is_used_without_measurement(choose, configure):
    assert choose(configure("data.loader=torch")) == ("torch", [])


@pytest.fixture
def no_dali(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


def test_without_dali_auto_chooses_torch_and_reports_why(choose, configure, no_dali):
    chosen, (line,) = choose(configure())
    assert (chosen, line) == ("torch", "data.loader=auto: torch, because NVIDIA DALI is not installed")


def test_configuring_dali_where_it_is_not_installed_is_one_line(choose, configure, no_dali):
    with pytest.raises(
        UserError, match=r"^data\.loader=dali needs NVIDIA DALI, .*: install nvidia-dali-cuda130 or set"
    ):
        choose(configure("data.loader=dali"))


def test_a_run_that_chose_dali_does_not_continue_without_it(choose, configure, monkeypatch):
    choose(configure(), torch=0.02, dali=0.01)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"^data\.loader=dali needs NVIDIA DALI"):
        choose(configure())
