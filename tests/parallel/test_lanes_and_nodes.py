"""What ranks share: the statistics of their lanes, and the nodes they are on."""

import pytest
import torch

from distrain.parallel.nodes import Peer, find_nodes
from distrain.parallel.statistics import LaneStatistics


@pytest.mark.parametrize("applied", [True, False])
def test_statistics_are_the_mean_over_lanes_and_stay_if_the_step_is_skipped(group, applied):
    norm = torch.nn.BatchNorm2d(2, momentum=0.5)
    statistics = LaneStatistics(norm, group, 2, ("loss",))
    statistics.begin_step()
    for mean, loss in ((2.0, 1.0), (6.0, 4.0)):  # the second lane starts from the statistics of the first again
        norm(torch.tensor([mean - 1, mean + 1]).view(2, 1, 1, 1).expand(2, 2, 1, 1))
        statistics.end_lane(loss=torch.tensor(loss))
    assert statistics.end_step(torch.tensor(applied)) == {"loss": torch.tensor(2.5)}
    assert norm.running_mean.tolist() == ([2.0, 2.0] if applied else [0.0, 0.0])  # (0 + 2) / 2 and (0 + 6) / 2
    assert norm.running_var.tolist() == ([1.5, 1.5] if applied else [1.0, 1.0])  # (1 + 2) / 2, of unbiased variances
    assert norm.num_batches_tracked.item() == applied


@pytest.mark.parametrize(
    ("ranks", "nodes"),
    [
        ([(0, "a"), (1, "a"), (0, "b"), (1, "b")], [2, 2]),
        ([(0, "a"), (0, "b"), (1, "b"), (2, "b")], [1, 3]),
        ([(0, "a"), (1, "a"), (0, "a"), (1, "a")], [2, 2]),  # two launchers on one machine
        ([(0, "a"), (0, "b"), (1, "a"), (1, "b")], [1, 1, 1, 1]),  # numbered across nodes
        ([(0, "a"), (1, "b")], [1, 1]),
        ([(0, "a")], [1]),
    ],
)
def test_ranks_that_a_launcher_numbered_in_sequence_on_a_machine_are_a_node(ranks, nodes):
    found = find_nodes([Peer(local_rank, "host", machine, 1, 1) for local_rank, machine in ranks])
    assert [len(node) for node in found] == nodes
    assert [rank for node in found for rank in node] == list(range(len(ranks)))
