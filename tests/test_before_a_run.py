"""What is tried before a run: train.dry_run and find-lr."""

import re

import pytest
from support.processes import train

from distrain.__main__ import main
from distrain.config import load
from distrain.errors import UserError
from distrain.recipe.find_lr import Point, suggest
from distrain.short_run import open_short_run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dry_run_says_what_a_run_will_do_and_keeps_nothing(settings, tmp_path, ranks):
    result = train(tmp_path / "run", *settings, "train.dry_run=true", ranks=ranks)
    assert result.code == 0, result.output
    for expected in (
        "data      203 images for training, 61 for validation, 3 classes",
        f"plan      3 epochs of 17 steps; in a step 12 images: 3 lanes of 4, on {ranks} rank",
        "network   densenet_bc_10_4: ",
        "schedule  cosine: learning rate 0.05 at first, at most 0.05, ",
        "step      loss ",
        "memory    ",
        "disk      ",
        "time      0:00:",
    ):
        assert result.output.count(expected) == 1, (expected, result.output)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_what_is_wrong(settings, tmp_path):
    result = train(tmp_path / "run", *settings, "train.dry_run=true", "model.num_classes=4")
    assert result.code == 78
    assert "model.num_classes=4, but" in result.output


def test_the_learning_rate_is_found_where_the_loss_falls_fastest(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["find-lr", "--from", "1e-4", "--to", "100", "--steps", "60", *settings]
    monkeypatch.setattr("sys.argv", ["distrain", *words])
    assert main() == 0
    found = re.search(r"falls fastest at optimizer\.lr=(\S+), and is lowest at (\S+)", capsys.readouterr().out)
    assert found
    assert 1e-3 < float(found[1]) <= float(found[2]) < 100
    assert (tmp_path / "lr.png").stat().st_size > 5000
    assert [path.name for path in tmp_path.iterdir()] == ["lr.png"]


def test_there_are_as_many_steps_as_asked_for_though_epochs_round(on_dataset, group):
    words = ["run.name=short", "model.name=densenet_bc_10_4", "train.epochs=1", "schedule.warmup_epochs=0"]
    settings = load(None, [*words, *on_dataset, "batch.lanes=1", "batch.per_lane=13"])  # 15.6 steps in an epoch
    with open_short_run(settings, group, print, 100) as short:
        assert short.plan.steps >= 100
        assert sum(1 for _ in short.batches) == short.plan.steps


def test_images_that_are_too_small_are_one_line(monkeypatch, capsys, on_dataset, tmp_path):
    words = ["find-lr", *on_dataset, "model.name=densenet121", "--out", str(tmp_path / "lr.png")]
    monkeypatch.setattr("sys.argv", ["distrain", *words])
    assert main() == 78
    assert "data.image_size or data.size_schedule" in capsys.readouterr().err


def test_the_suggestion_is_the_steepest_point_before_the_lowest():
    losses = [2.3, 2.3, 2.2, 1.9, 1.2, 1.0, 0.95, 1.5, 3.0]
    points = [Point(10.0**exponent, loss) for exponent, loss in enumerate(losses, -6)]
    assert suggest(points) == pytest.approx((1e-3, 1.0))
    with pytest.raises(UserError, match="diverged within the first steps: set --from lower"):
        suggest(points[:3])


@pytest.mark.parametrize("words", [("--from", "1", "--to", "0.1"), ("--from", "0"), ("--steps", "3")])
def test_a_range_that_is_none_is_one_line(monkeypatch, capsys, words):
    monkeypatch.setattr("sys.argv", ["distrain", "find-lr", *words, "model.name=densenet121"])
    assert main() == 78
    assert "--from must be above 0 and below --to, and --steps at least 10" in capsys.readouterr().err
