"""Runs on data with any number of labels per image."""

import json

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from support.processes import Training, train

from distrain.config import LossConfig
from distrain.evaluate import average_precision, mean_of_defined, top1_hits
from distrain.recipe.losses import BinaryCrossEntropy, class_weights, make_loss


@pytest.fixture(scope="module")
def trained(colors_run):
    return colors_run[1]


def test_a_run_learns_and_reports_its_mean_average_precision(trained):
    found = trained.series("val/mAP")
    assert found[min(found)] < 0.72 < found[max(found)]  # by chance: 0.4
    assert trained.last_line.startswith(f"done: mAP {found[max(found)]:.2%}  of 61 images")
    assert f"val mAP {found[max(found)]:.2%}" in trained.output
    assert not trained.series("val/top1")
    best = json.loads((trained.folder / "checkpoints" / "best.json").read_text())
    assert max(found.values()) in best.values()


def test_a_killed_run_resumes_bit_for_bit(trained, colors, tmp_path):
    training = Training(tmp_path / "run", *colors)
    training.wait_for_step(20)
    training.kill()
    resumed = train(tmp_path / "run", *colors)
    assert "resuming at step" in resumed.output
    assert resumed.digest == trained.digest
    assert resumed.series("val/mAP") == trained.series("val/mAP")


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_another_number_of_ranks_trains_the_same(strategy, trained, colors, tmp_path):
    result = train(tmp_path / "run", *colors, f"parallel.strategy={strategy}", ranks=2)
    assert result.code == 0, result.output
    one, two = trained.series("train/loss"), result.series("train/loss")
    assert [two[step] for step in range(1, 20)] == pytest.approx([one[step] for step in range(1, 20)], rel=1e-4)


def test_the_same_weights_have_the_same_precision_on_any_number_of_ranks(trained, colors, tmp_path):
    """No step changes the weights, so that only validation can differ."""
    chosen = ("optimizer.lr=0", "train.epochs=0.1", f"model.init={trained.folder}:last", "batch.lanes=3")
    found = [train(tmp_path / str(n), *colors, *chosen, ranks=n).series("val/mAP") for n in (1, 2, 3)]
    assert found[0]
    assert found[0] == found[1] == found[2]


def test_one_label_per_image_can_be_trained_by_binary_cross_entropy(colors, on_dataset, tmp_path):
    chosen = (*colors, *on_dataset, "train.epochs=0.5", "loss.label_smoothing=0.1")
    result = train(tmp_path / "run", *chosen, "loss.name=bce")
    assert result.code == 0, result.output
    assert result.last_line.startswith("done: top-1 ")
    assert "top-5" not in result.last_line  # of three classes
    refused = train(tmp_path / "run", *chosen)
    assert refused.code == 78
    assert "loss.name was 'bce' when this run began and is 'cross_entropy' now" in refused.output


def test_the_loss_is_that_of_torch():
    torch.manual_seed(0)
    logits, targets = 3 * torch.randn(5, 4), (torch.rand(5, 4) < 0.5).to(torch.uint8)
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0])
    loss = make_loss(LossConfig(), "bce", weights)(logits.bfloat16(), targets)
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(logits.bfloat16().float(), targets.float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    labels = torch.tensor([0, 3, 1, 1, 2])
    smoothed = 0.8 * F.one_hot(labels, 4) + 0.2 / 4
    expected = F.binary_cross_entropy_with_logits(logits, smoothed)
    assert torch.allclose(BinaryCrossEntropy(label_smoothing=0.2)(logits, labels), expected)


def test_balanced_weights_are_negatives_by_positives():
    assert class_weights("balanced", ["a", "b"], np.array([10, 80]), 100).tolist() == [9.0, 0.25]


def test_average_precision_is_that_of_scikit_learn_over_classes_with_positives():
    rng = np.random.default_rng(0)
    targets = (rng.random((300, 4)) < [0.1, 0.5, 0, 0.9]).astype(np.uint8)
    scores = (targets + rng.normal(size=targets.shape)).round(1).astype(np.float32)  # with ties
    defined = [0, 1, 3]
    expected = sklearn.metrics.average_precision_score(targets[:, defined], scores[:, defined], average="macro")
    found = average_precision(targets, scores)
    assert np.isnan(found[2])
    assert mean_of_defined(found) == pytest.approx(expected, rel=1e-12)
    scores[0, 3] = np.nan
    assert average_precision(targets, scores)[3] == 0


def test_a_hit_is_any_of_the_labels():
    logits = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    assert top1_hits(logits, torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.uint8)).tolist() == [1, 1, 0]
