"""Precise BatchNorm: running statistics recomputed with the weights as they are."""

import numpy as np
import pytest
import torch
from support.processes import train
from torch import nn

from distrain.checkpoint import committed, read, weights_digest
from distrain.checkpoint.files import step_of
from distrain.models import freeze
from distrain.parallel.statistics import recompute_statistics

PRECISE = ("evaluate.precise_bn_steps=3", "evaluate.every_epochs=0.7", "ema.decay=0.9", "ema.every_steps=2")


def small_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
    )


def test_statistics_are_those_of_torchs_cumulative_average(group):
    batches = [torch.randn(6, 3, 8, 8) * scale for scale in (1, 2, 5)]
    network, reference = small_network(), small_network()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # torch: the mean over all batches
            module.reset_running_stats()
    for images in batches:
        network(images * 9)  # a running average that is to be forgotten
        reference(images)
    weights = [parameter.clone() for parameter in network.parameters()]

    recompute_statistics([network], iter(batches), group)
    for found, expected in zip(network.modules(), reference.modules(), strict=True):
        if isinstance(found, nn.BatchNorm2d):
            torch.testing.assert_close(found.running_mean, expected.running_mean)
            torch.testing.assert_close(found.running_var, expected.running_var)
            assert found.num_batches_tracked == 3
    assert [network[1].momentum, network[4].momentum] == [0.3, 0.1]
    assert all(map(torch.equal, weights, network.parameters()))


def test_frozen_statistics_stay(group):
    network = small_network()
    freeze(network, ["1"])
    before = network[1].running_mean.clone()
    recompute_statistics([network], iter([torch.randn(6, 3, 8, 8)]), group)
    assert torch.equal(network[1].running_mean, before)
    assert network[4].running_mean.any()


def test_a_network_without_running_statistics_stays(group):
    network = small_network()
    freeze(network, ["*", "!3"])
    recompute_statistics([network], iter([torch.randn(6, 3, 8, 8)]), group)
    assert not network[1].running_mean.any()


@pytest.fixture(scope="module")
def precise(settings, tmp_path_factory):
    """Settings, and the finished run on one rank."""
    chosen = (*settings, *PRECISE)
    result = train(tmp_path_factory.mktemp("precise") / "run", *chosen)
    assert result.code == 0, result.output
    assert "images that crash a decoder will not be found" not in result.output
    return chosen, result


def test_the_last_checkpoint_holds_the_statistics_that_were_validated(precise):
    result = precise[1]
    newest = max(committed(result.folder / "checkpoints"), key=step_of)
    assert weights_digest(read(newest).tensors) == result.digest


def test_training_is_as_without_and_validation_is_not(precise, tmp_path):
    settings, with_precise = precise
    without = train(tmp_path / "run", *settings, "evaluate.precise_bn_steps=0")
    assert with_precise.series("train/loss") == without.series("train/loss")
    assert with_precise.series("val/loss") != without.series("val/loss")
    assert with_precise.digest != without.digest


@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_does_not_depend_on_the_number_of_ranks(precise, tmp_path, ranks):
    settings, one = precise
    several = train(tmp_path / "run", *settings, ranks=ranks)
    expected, found = (list(result.series("val/loss").values()) for result in (one, several))
    assert len(expected) == 5
    np.testing.assert_allclose(found, expected, rtol=2e-4)


def test_a_crash_and_a_stop_in_between_do_not_change_the_weights(precise, tmp_path):
    settings, uninterrupted = precise
    crashed = train(tmp_path / "run", *settings, "resilience.faults=[exception@evaluate.batch:24]")
    assert crashed.code not in (0, 78), crashed.output
    stopped = train(tmp_path / "run", *settings, "train.stop_epoch=1.9")
    assert stopped.code not in (0, 78), stopped.output
    assert train(tmp_path / "run", *settings).digest == uninterrupted.digest
