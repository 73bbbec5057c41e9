"""evaluate.patience, data.limit and train.overfit_batches."""

import json

import pytest
from support.processes import train

from distrain.config import EvaluateConfig, load
from distrain.data.loading.setup import load_indexes
from distrain.errors import UserError
from distrain.evaluate import Accuracy
from distrain.parallel.group import Group
from distrain.recipe.early_stopping import EarlyStopping

STEPS = {10, 20, 30, 40, 50, 60, 70}


def stops(group: Group, folder, top1: dict[int, int], **settings) -> list[int]:
    """The steps at which a run with these hits among 100 images ends."""
    folder.mkdir(exist_ok=True)
    stopping = EarlyStopping(EvaluateConfig(**settings), folder, STEPS, group)
    found = {at: Accuracy(100, hits, 100, 5 - hits / 100, 10) for at, hits in top1.items()}
    return [at for at, accuracy in found.items() if stopping.observe(at, accuracy)]


def test_a_run_ends_after_validations_without_a_new_best(group, tmp_path):
    hits = {10: 50, 20: 60, 30: 60, 40: 55, 50: 58}
    assert stops(group, tmp_path / "a", hits, patience=3) == [50]
    assert stops(group, tmp_path / "b", hits, patience=2) == [40, 50]
    assert stops(group, tmp_path / "c", hits, patience=2, metric="loss") == [40, 50]
    assert stops(group, tmp_path / "d", hits, patience=4) == []
    assert stops(group, tmp_path / "e", hits) == []
    assert stops(group, tmp_path / "f", hits, patience=1, metric="top5") == [20, 30, 40, 50]


def test_a_restart_or_rollback_continues_from_what_was_best_before_it(group, tmp_path):
    assert stops(group, tmp_path, {10: 50, 20: 60, 30: 70}, patience=2) == []
    # Back to step 20: what comes now is other than before, and 70 % is not reached.
    assert stops(group, tmp_path, {20: 60, 30: 55, 40: 58}, patience=2) == [40]
    assert stops(group, tmp_path, {40: 58}, patience=2) == [40]  # a start of the finished run


def test_a_validation_in_between_does_not_change_when_a_run_ends(group, tmp_path):
    hits = {10: 55, 20: 58, 30: 57, 40: 57}
    assert stops(group, tmp_path / "a", hits, patience=2) == [40]
    assert stops(group, tmp_path / "b", {10: 55, 15: 60, 20: 58, 30: 57, 40: 57}, patience=2) == [40]


def test_validations_that_a_rollback_skips_do_not_count(group, tmp_path):
    assert stops(group, tmp_path, {10: 50, 20: 70}, patience=2) == []
    stopping = EarlyStopping(EvaluateConfig(patience=2), tmp_path, STEPS - {20, 30}, group)
    assert not stopping.observe(40, Accuracy(100, 45, 100, 1.0, 10))
    assert stopping.observe(50, Accuracy(100, 45, 100, 1.0, 10))


def test_nan_is_never_the_best(group, tmp_path):
    stopping = EarlyStopping(EvaluateConfig(patience=3, metric="loss"), tmp_path, STEPS, group)
    losses = {10: float("nan"), 20: 2.0, 30: float("nan"), 40: 2.1, 50: 2.2}
    assert [at for at, loss in losses.items() if stopping.observe(at, Accuracy(100, 1, 1, loss, 10))] == [50]


def test_a_metric_that_is_not_measured_is_refused(on_dataset, colors):
    words = ["evaluate.patience=3", "evaluate.metric=top5", "run.name=a"]
    with pytest.raises(UserError, match=r"evaluate.metric=top5 is always 1 of the 3 classes"):
        load_indexes(load(None, ["model.name=densenet121", *on_dataset, *words]))
    with pytest.raises(UserError, match=r"evaluate.metric=top5 is not measured of multi-label data"):
        load_indexes(load(None, [*colors, *words]))


def test_a_damaged_record_is_one_line(group, tmp_path):
    (tmp_path / "early_stopping.json").write_text("{}")
    with pytest.raises(UserError, match=r"early_stopping.json: lacks bests: delete it"):
        stops(group, tmp_path, {10: 50}, patience=1)


def test_a_run_ends_early_on_all_ranks_and_stays_ended(settings, tmp_path):
    # A learning rate of almost nothing: the first validation stays the best.
    chosen = (*settings, "optimizer.lr=1e-9", "evaluate.every_epochs=0.5", "evaluate.patience=2")
    ended = train(tmp_path / "run", *chosen, ranks=2)
    assert ended.code == 0, ended.output
    assert "ends early: no new best in 2 validations" in ended.output
    assert max(ended.series("train/loss")) == 25  # validated after steps 8, 17 and 25 of 51
    again = train(tmp_path / "run", *chosen, ranks=2)
    assert again.digest == ended.digest
    assert max(again.series("train/loss")) == 25
    longer = train(tmp_path / "run", *chosen, "evaluate.patience=0", ranks=2)
    assert max(longer.series("train/loss")) == 51


def test_a_run_that_has_rolled_back_ends_after_validations_that_took_place(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "decisions.json").write_text(json.dumps({"skipped_steps": [[10, 30]]}))
    chosen = ("optimizer.lr=1e-9", "evaluate.every_epochs=0.5", "evaluate.patience=2")
    ended = train(tmp_path / "run", *settings, *chosen)
    assert max(ended.series("train/loss")) == 42  # validated after steps 8, 34 and 42, not after 17 and 25


def test_overfitting_repeats_the_same_images_without_augmentation_and_validates_on_them(settings, tmp_path):
    chosen = (*settings, "train.overfit_batches=2", "train.epochs=30", "model.options={}", "augment.erase=1")
    result = train(tmp_path / "run", *chosen)
    assert result.code == 0, result.output
    assert "of 24 images" in result.output.splitlines()[-1]  # 2 batches of 3 lanes of 4
    assert "top-1 100.00%" in result.output.splitlines()[-1]
    losses = result.series("train/loss")
    assert losses[max(losses)] < 0.3 * losses[1]


def test_a_limited_run_trains_and_validates_on_that_many_images(settings, tmp_path):
    result = train(tmp_path / "run", *settings, "data.limit=36", "train.epochs=2")
    assert "of 36 images" in result.output.splitlines()[-1]
    assert max(result.series("train/loss")) == 6
