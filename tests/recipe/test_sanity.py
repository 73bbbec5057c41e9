"""Warnings of broken runs."""

import math

from support.processes import train

from distrain.evaluate import Accuracy
from distrain.recipe.sanity import SanityCheck, guessing_loss

HEALTHY = {"train/loss": 1.5, "train/top1": 0.5, "train/grad_norm": 1.0}


def warnings(reports=(), validations=(), classes=10, epoch=200, loss="cross_entropy") -> list[str]:
    found: list[str] = []
    check = SanityCheck(classes, epoch, guessing_loss(loss, classes), found.append)
    for step, metrics in reports:
        check.check_report(step, HEALTHY | metrics)
    for hits in validations:
        check.check_validation(Accuracy(1000, hits, 1000, 1.0, classes))
    return found


def test_a_healthy_run_has_no_warning():
    assert warnings([(10, {"train/loss": 2.5}), (200, {"train/loss": 2.0}), (400, {})], [400, 600]) == []


def test_a_loss_of_guessing_is_reported_once_and_after_an_epoch():
    flat = {"train/loss": math.log(10) - 0.01}
    assert warnings([(100, flat), (199, flat)]) == []
    (line,) = warnings([(200, flat), (300, flat)])
    assert line.startswith("warning: the loss is still that of guessing, 2.303, after 200 steps: is optimizer.lr right")
    assert warnings([(50, flat)], epoch=10) == []
    assert warnings([(200, flat)], loss="bce") == []


def test_a_dead_network_is_reported():
    (line,) = warnings([(1, {"train/grad_norm": 0.0})])
    assert "the gradient is zero" in line


def test_validation_at_chance_is_reported_if_training_is_not():
    (line,) = warnings([(10, {"train/top1": 0.6})], [110, 100])
    assert "validation is at chance, 11.0%, and training is not, 60.0%: do the labels of data.val belong" in line
    assert warnings([(10, {"train/top1": 0.2})], [110]) == []
    assert warnings([(10, {"train/top1": 0.6})], [300]) == []
    assert warnings([(10, {"train/top1": 1.0})], [500], classes=2) == []


def test_a_run_that_cannot_learn_says_so(settings, tmp_path):
    # Targets that are almost equal for all classes: nothing can be learned from them.
    chosen = ("optimizer.lr=1e-12", "loss.label_smoothing=0.95", "train.epochs=8", "track.every_steps=10")
    result = train(tmp_path / "run", *settings, *chosen, ranks=2)
    assert result.code == 0
    assert result.output.count("warning: the loss is still that of guessing, 1.099, after 100 steps") == 1
