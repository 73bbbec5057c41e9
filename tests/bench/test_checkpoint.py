import json

import pytest
import torch

from distrain import models
from distrain.__main__ import main
from distrain.bench.checkpoint import timed
from distrain.checkpoint import Checkpointer

SMALL = ("model.name=densenet_bc_10_4", "model.num_classes=3", "data.image_size=8", "data.val_resize=8")
STEP = ("batch.lanes=2", "batch.per_lane=4", "train.memory_format=contiguous", "train.dense_block=plain")


def bench(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "bench", "checkpoint", *SMALL, *STEP, *words])
    return main()


def test_checkpoint_times_are_compared_with_a_step(monkeypatch, tmp_path, capsys):
    results = tmp_path / "results.json"
    assert bench(monkeypatch, "--rounds", "2", "--folder", str(tmp_path), "--json", str(results)) == 0
    measured = json.loads(results.read_text())
    weights = sum(weight.nbytes for weight in models.build("densenet_bc_10_4", 3).parameters())
    assert 2 * weights < measured["bytes"] < 2.5 * weights  # weights, momentum and running statistics
    assert list(measured["seconds"]) == ["step", "stall", "step_during_write", "commit"]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in measured["seconds"].values())
    assert list(tmp_path.iterdir()) == [results]
    assert "stall: copying the state" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--folder", "/nowhere"), "--folder /nowhere: directory not found"),
        (("--json", "/nowhere/results.json"), "--json /nowhere/results.json: cannot be written"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_measured(monkeypatch, capsys, words, message):
    assert bench(monkeypatch, *words) == 78
    assert message in capsys.readouterr().err


def test_what_is_timed_includes_the_work_left_on_a_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: calls.append(f"wait for {device}"))
    timed(lambda: calls.append("work"), torch.device("cuda", 0))
    assert calls == ["wait for cuda:0", "work", "wait for cuda:0"]


def test_the_stall_is_timed_from_an_idle_device_to_an_idle_device(monkeypatch):
    calls = []
    save = Checkpointer.save

    def recorded(*args, **kwargs):
        calls.append("save")
        save(*args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", recorded)
    monkeypatch.setattr("distrain.bench.checkpoint.synchronize", lambda device: calls.append("wait"))
    assert bench(monkeypatch, "--rounds", "1") == 0
    one_round = ["wait", "wait", "wait", "save", "wait", "wait", "wait"]  # a step, the save, a step during the write
    assert calls == 2 * one_round
