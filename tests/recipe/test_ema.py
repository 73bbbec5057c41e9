import torch

from distrain.recipe.ema import EMA


def test_the_average_moves_by_its_share_and_is_kept_in_a_state():
    network = torch.nn.BatchNorm2d(1)
    average = EMA(network, decay=0.75)
    network.weight.data.fill_(5.0)
    network.num_batches_tracked.fill_(3)
    average.update(network.state_dict())
    average.update(network.state_dict())
    assert average.network.weight.item() == 1 + 4 * (1 - 0.75**2)
    assert average.network.num_batches_tracked.item() == 3

    restarted = EMA(torch.nn.BatchNorm2d(1), decay=0.75)
    restarted.load(average.state())
    assert restarted.network.weight.item() == average.network.weight.item()
