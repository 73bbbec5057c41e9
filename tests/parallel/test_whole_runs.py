"""Runs under DeepSpeed and of split lanes, started as a user starts them."""

import json

import numpy as np
import pytest
from support.processes import SMALL, Training, train

# 203 samples in steps of 24 are 8.5 steps an epoch: 4 epochs are 34 steps.
SETTINGS = (
    *SMALL, "batch.lanes=6", "batch.per_lane=4", "train.epochs=4", "checkpoint.every_steps=5", "evaluate.batch=16",
    "optimizer.lr=0.02", "ema.decay=0.9", "ema.every_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(on_dataset) -> tuple[str, ...]:
    return (*SETTINGS, *on_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_killed_run_ends_in_the_same_bits_under_zero(settings, strategy, tmp_path):
    chosen = (*settings, f"parallel.strategy={strategy}")
    uninterrupted = train(tmp_path / "uninterrupted", *chosen, ranks=3)
    assert uninterrupted.code == 0, uninterrupted.output
    training = Training(tmp_path / "killed", *chosen, ranks=3)
    training.wait_for_step(13)
    training.kill()
    result = train(tmp_path / "killed", *chosen, ranks=3)
    assert "resuming at step" in result.output
    assert result.digest == uninterrupted.digest


@pytest.mark.slow
def test_a_run_resumes_under_other_strategies_and_numbers_of_ranks_without_loss(settings, tmp_path):
    uninterrupted = train(tmp_path / "uninterrupted", *settings)
    training = Training(tmp_path / "moved", *settings, "parallel.strategy=zero3", ranks=2)
    training.wait_for_step(7)
    training.kill()
    training = Training(tmp_path / "moved", *settings, "parallel.strategy=zero1", "parallel.offload=true", ranks=3)
    training.wait_for_step(20)
    training.kill()
    moved = train(tmp_path / "moved", *settings, ranks=2)
    assert moved.code == 0, moved.output
    losses, expected = (result.series("train/loss") for result in (moved, uninterrupted))
    assert list(losses) == list(expected) == list(range(1, 35))
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-5)
    assert moved.series("val/top1") == uninterrupted.series("val/top1")


def test_split_lanes_train_like_that_many_lanes(settings, tmp_path):
    for name in ("split", "many"):
        (tmp_path / name).mkdir()
    (tmp_path / "split" / "decisions.json").write_text(json.dumps({"lane_splits": 2}))
    split = train(tmp_path / "split", *settings, "batch.lanes=3", "batch.per_lane=8")
    many = train(tmp_path / "many", *settings)
    assert split.digest == many.digest
    assert split.series("train/loss") == many.series("train/loss")


def test_a_number_of_ranks_that_does_not_divide_the_lanes_is_refused_under_zero(settings, tmp_path):
    refused = train(tmp_path / "refused", *settings, "parallel.strategy=zero1", "batch.lanes=5", ranks=2)
    lines = [line for line in refused.output.splitlines() if line.startswith("distrain:")]
    assert lines == [
        "distrain: parallel.strategy=zero1 needs the same number of lanes on every rank, and batch.lanes=5 is "
        "not divisible by 2 ranks: start 1, or set parallel.strategy=ddp"
    ]


def test_zero_trains_in_one_process_without_torchrun_and_ignores_empty_variables(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "")
    result = train(tmp_path / "zero", *settings, "parallel.strategy=zero3", "train.epochs=0.2")
    assert result.code == 0, result.output
    assert "distrain: empty in the environment, and ignored: LOCAL_RANK" in result.output
