"""Runs under DeepSpeed, started as a user starts them."""

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
    uninterrupted = train(tmp_path / "undisturbed", *chosen, ranks=3)
    assert uninterrupted.code == 0, uninterrupted.output
    training = Training(tmp_path / "killed", *chosen, ranks=3)
    training.wait_for_step(13)
    training.kill()
    result = train(tmp_path / "killed", *chosen, ranks=3)
    assert "resuming at step" in result.output
    assert result.digest == uninterrupted.digest


@pytest.mark.slow
def test_a_run_moves_from_zero_to_ddp_and_to_other_ranks_and_loses_nothing(settings, tmp_path):
    uninterrupted = train(tmp_path / "undisturbed", *settings)
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


def test_lanes_cut_into_parts_are_trained_as_so_many_lanes(settings, tmp_path):
    for name in ("cut", "many"):
        (tmp_path / name).mkdir()
    (tmp_path / "cut" / "decisions.json").write_text(json.dumps({"parts": 2}))
    cut = train(tmp_path / "cut", *settings, "batch.lanes=3", "batch.per_lane=8")
    many = train(tmp_path / "many", *settings)
    assert cut.digest == many.digest
    assert cut.series("train/loss") == many.series("train/loss")


def test_ranks_that_zero_cannot_deal_lanes_to_are_refused_in_one_line(settings, tmp_path):
    refused = train(tmp_path / "refused", *settings, "parallel.strategy=zero1", "batch.lanes=5", ranks=2)
    said = [line for line in refused.output.splitlines() if line.startswith("distrain:")]
    assert said == [
        "distrain: parallel.strategy=zero1 needs as many lanes on every rank, and batch.lanes=5 does not divide by "
        "2 ranks: start 1, or set parallel.strategy=ddp"
    ]
