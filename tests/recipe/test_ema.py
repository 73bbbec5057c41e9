import pytest
import torch
from support.execution import settings
from torch.optim.swa_utils import AveragedModel

from distrain.config import EmaConfig
from distrain.errors import UserError
from distrain.learner import Learner, build_network
from distrain.recipe.ema import EMA


def test_the_ema_decays_and_is_restored_from_its_state():
    network = torch.nn.BatchNorm2d(1)
    ema = EMA(network, EmaConfig(decay=0.75))
    network.weight.data.fill_(5.0)
    network.num_batches_tracked.fill_(3)
    for number in (1, 2, 3):
        ema.update(network.state_dict(), number)
    assert ema.network.weight.item() == 1 + 4 * (1 - 0.75**3)
    assert ema.network.num_batches_tracked.item() == 3

    restarted = EMA(torch.nn.BatchNorm2d(1), EmaConfig(decay=0.75))
    restarted.load(ema.state())
    assert restarted.network.weight.item() == ema.network.weight.item()


def test_the_decay_of_an_ema_with_warm_up_grows_to_the_one_configured():
    network, expected = torch.nn.Linear(1, 1), 0.0
    network.weight.data.fill_(0.0)
    ema = EMA(network, EmaConfig(decay=0.5, warmup=True))
    network.weight.data.fill_(1.0)
    for number, decay in ((1, 2 / 11), (4, 5 / 14), (8, 0.5), (100, 0.5)):
        ema.update(network.state_dict(), number)
        expected = decay * expected + 1 - decay
        assert ema.network.weight.item() == pytest.approx(expected)


def test_equal_weights_since_an_epoch_are_those_of_torchs_swa(group, tmp_path):
    run = settings(tmp_path, "ema.equal=true", "ema.every_steps=2")
    learner = Learner(run, group, build_network(run, group.device), None, print)
    peer = AveragedModel(torch.nn.Linear(1, 1))
    for step in range(1, 13):
        with torch.no_grad():
            learner.strategy.network.network.head.bias.fill_(step**2)
        learner.update_ema(step, start=5)
        if step % 2 == 0:
            expected = step**2
            if step > 5:  # the first average is of step 6
                peer.update_parameters(with_bias(step**2))
                expected = peer.module.bias.item()
            assert copies(learner)["ema/head.bias"][0].item() == pytest.approx(expected)


def with_bias(value: float) -> torch.nn.Module:
    network = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(network.bias, value)
    return network


def test_an_average_is_either_equal_or_exponential():
    with pytest.raises(UserError, match=r"ema.equal=true has no decay: set ema.decay=0"):
        EmaConfig(equal=True, decay=0.9)


def test_a_restarted_run_has_the_ema_that_was_saved(group, tmp_path):
    run = settings(tmp_path, "ema.decay=0.5", "ema.every_steps=2")
    learner = Learner(run, group, build_network(run, group.device), None, print)
    with torch.no_grad():
        for parameter in learner.strategy.network.parameters():
            parameter.add_(1.0)
    before = copies(learner)
    learner.update_ema(1)
    assert torch.equal(copies(learner)["ema/head.bias"], before["ema/head.bias"])
    learner.update_ema(2)
    saved = copies(learner)
    torch.testing.assert_close(saved["ema/head.bias"], (before["ema/head.bias"] + saved["model/head.bias"]) / 2)
    resumed = copies(Learner(run, group, build_network(run, group.device), saved, print))
    assert saved.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)


def copies(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state().items()}
