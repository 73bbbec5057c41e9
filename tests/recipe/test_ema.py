import torch

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
