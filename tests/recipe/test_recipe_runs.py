"""Whole runs with what recipes consist of: the same on any number of ranks, and bit for bit after a crash."""

import numpy as np
import pytest
from support.processes import train

RECIPES = {
    "cutmix": (
        "augment.mixup=0.2", "augment.cutmix=1", "augment.auto_augment=randaugment", "augment.erase=0.3",
        "optimizer.clip_agc=0.05", "schedule.name=one_cycle", "schedule.warmup_epochs=1", "ema.decay=0.9",
        "ema.warmup=true", "ema.every_steps=2", "loss.label_smoothing=0.1", "distill.teacher={teacher}",
        "distill.weight=0.3", "distill.temperature=2",
    ),
    "bce": (
        "augment.cutmix=0.5", "augment.mix_prob=0.7", "augment.auto_augment=augmix", "optimizer.clip_value=0.01",
        "schedule.name=multi_step", "schedule.milestones=[1, 2.5]", "schedule.gamma=0.3", "loss.name=bce",
        "data.size_schedule=[[0, 6], [1, 8]]", "data.limit=150",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(RECIPES))
def recipe(request, settings, finished, tmp_path_factory):
    """Settings, and the finished run on one rank."""
    chosen = (*settings, *(word.replace("{teacher}", str(finished[1])) for word in RECIPES[request.param]))
    result = train(tmp_path_factory.mktemp("recipe") / "run", *chosen)
    assert result.code == 0, result.output
    return chosen, result


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_do_not_depend_on_the_number_of_ranks(recipe, tmp_path, ranks):
    settings, one = recipe
    several = train(tmp_path / "run", *settings, ranks=ranks)
    expected, found = (list(result.series("train/loss").values()) for result in (one, several))
    assert len(expected) > 30
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_a_crash_does_not_change_the_weights(recipe, tmp_path):
    settings, uninterrupted = recipe
    crashed = train(tmp_path / "run", *settings, "resilience.faults=[exception@train.step:19]")
    assert crashed.code not in (0, 78), crashed.output
    assert train(tmp_path / "run", *settings).digest == uninterrupted.digest
