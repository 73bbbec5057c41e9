import torch
from support.execution import settings

from distrain.learner import Learner, build_network
from distrain.recipe.ema import EMA


def test_the_ema_decays_and_is_restored_from_its_state():
    network = torch.nn.BatchNorm2d(1)
    ema = EMA(network, decay=0.75)
    network.weight.data.fill_(5.0)
    network.num_batches_tracked.fill_(3)
    for _ in range(3):
        ema.update(network.state_dict())
    assert ema.network.weight.item() == 1 + 4 * (1 - 0.75**3)
    assert ema.network.num_batches_tracked.item() == 3

    restarted = EMA(torch.nn.BatchNorm2d(1), decay=0.75)
    restarted.load(ema.state())
    assert restarted.network.weight.item() == ema.network.weight.item()


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
