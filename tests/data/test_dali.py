"""How DALI is set up, fed and closed."""

import weakref
from contextlib import closing
from itertools import islice
from threading import Barrier

import numpy as np
import pytest
import torch
from nvidia.dali import backend, fn

from distrain.data.loading.dali import DaliLoader
from distrain.data.loading.in_flight import InFlight
from distrain.data.loading.loaders import open_loader
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.reader import SampleReader
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import make_loader, make_plan, make_quarantine
from distrain.data.storage.store import LocalStore

CPU = torch.device("cpu")
REJECTED = """Error in MIXED operator `nvidia.dali.fn.decoders.image_slice`,
which was used in the pipeline definition, encountered:

Failed to decode sample #1 :
Current pipeline object is no longer valid.
"""


def first_requests(run, index, count):
    return [*islice(train_requests(run, make_plan(run, index), index, range(2)), count)]


def open_dali(run, index):
    return closing(make_loader(run, "dali", index, make_quarantine(run, index, "train"), CPU))


@pytest.mark.parametrize(("deterministic", "share"), [("true", 0.0), ("false", 0.65)])
def test_the_decoder_is_told_how_to_round(configure, train_index, monkeypatch, deterministic, share):
    options = []
    decode = fn.decoders.image_slice

    def recorded(*inputs, **chosen):
        options.append(chosen)
        return decode(*inputs, **chosen)

    monkeypatch.setattr(fn.decoders, "image_slice", recorded)
    with open_dali(configure(f"train.deterministic={deterministic}"), train_index):
        pass
    assert {chosen["hw_decoder_load"] for chosen in options} == {share}
    assert all(chosen["jpeg_fancy_upsampling"] and not chosen["affine"] for chosen in options)


def test_two_batches_are_decoded_at_a_time(configure, train_index, monkeypatch):
    """Each waits until another is being decoded too."""
    run, together = configure("data.threads=2"), Barrier(2, timeout=240)
    decode = DaliLoader._run_pipeline

    def run_pipeline(self, feeds):
        together.wait()
        return decode(self, feeds)

    monkeypatch.setattr(DaliLoader, "_run_pipeline", run_pipeline)
    requests = first_requests(run, train_index, 4)
    with open_dali(run, train_index) as loader:
        assert len(list(loader.stream(requests))) == 4


class FailingPipeline:
    """Rejects its third batch, and all that come after it, as DALI does."""

    def __init__(self, pipeline, kinds, rejections):
        self._pipeline = pipeline
        self._kinds = kinds
        self._rejections = rejections
        self._runs = 0

    def feed_input(self, name, values):
        self._kinds[name] = type(values)
        self._pipeline.feed_input(name, values)

    def run(self):
        self._runs += 1
        if self._runs >= 3:
            self._rejections.append(self._runs)
            raise RuntimeError(REJECTED)
        return self._pipeline.run()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_that_a_fake_pipeline_rejects_takes_no_other_along(
    configure, train_index, monkeypatch, tmp_path, threads
):
    run = configure(f"data.threads={threads}")
    requests = first_requests(run, train_index, 12)
    with open_dali(run, train_index) as loader:
        expected = list(loader.stream(requests))

    kinds, rejections, build = {}, [], DaliLoader._build_pipeline
    monkeypatch.setattr(DaliLoader, "_build_pipeline", lambda self: FailingPipeline(build(self), kinds, rejections))
    record = InFlight(tmp_path, "train")
    quarantine = Quarantine(tmp_path / "list", "train", len(train_index), 0.5)
    reader = SampleReader(train_index, LocalStore(train_index), quarantine, record)
    with closing(open_loader("dali", run.data, run.augment, run.run.seed, 4, reader, CPU)) as loader:
        found = list(loader.stream(requests))
        assert len(record._free) == 4096
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert (one.images.int() - other.images.int()).abs().float().mean() <= 1
    assert 3 <= len(rejections) <= 4
    assert set(rejections) == {3}  # no pipeline is used again that has failed
    assert kinds.pop("encoded") is list
    assert set(kinds.values()) == {np.ndarray}


def test_memory_is_released_after_the_pipelines_are_gone(configure, train_index, monkeypatch):
    pipelines, build, alive = [], DaliLoader._build_pipeline, []

    def recorded(self):
        pipeline = build(self)
        pipelines.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(DaliLoader, "_build_pipeline", recorded)
    monkeypatch.setattr(
        backend, "ReleaseUnusedMemory", lambda: alive.append(sum(one() is not None for one in pipelines))
    )
    run = configure("data.threads=2")
    requests = first_requests(run, train_index, 4)
    with open_dali(run, train_index) as loader:
        list(loader.stream(requests))
    assert len(pipelines) == 2
    assert alive == [0]
