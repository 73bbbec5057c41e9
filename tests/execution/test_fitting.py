import pytest
import torch
from support.execution import kept_bytes, modes

from distrain.errors import UserError
from distrain.execution.fitting import TrialStep, fit_memory
from distrain.execution.recomputation import count_kept_bytes


def mock_device(limit: int) -> TrialStep:
    """A training step on a simulated GPU with memory for `limit` kept bytes."""

    def trial_step(network, images):
        if count_kept_bytes(network, images) > limit:
            raise torch.OutOfMemoryError

    return trial_step


def test_a_network_that_fits_is_left_unchanged(network, group):
    images = torch.randn(8, 3, 16, 16)
    assert fit_memory(network, images, 1, group, mock_device(10**9), print) == 1
    assert modes(network) == ["none"] * 9


def test_blocks_are_recomputed_before_lanes_are_split(network, group):
    images, lines = torch.randn(8, 3, 16, 16), []
    half = kept_bytes(network, 8) // 2
    assert fit_memory(network, images, 1, group, mock_device(half), lines.append) == 1
    assert modes(network) == ["full"] * 9
    less = kept_bytes(network, 8) - 1
    assert fit_memory(network, images, 1, group, mock_device(less), lines.append) == 2
    assert [line[:34] for line in lines] == ["out of memory: recomputing all blo", "out of memory: splitting each lane"]


def test_a_device_without_memory_is_one_line(network, group):
    with pytest.raises(UserError, match=r"batch\.per_lane=8 does not fit the memory of the device"):
        fit_memory(network, torch.randn(8, 3, 16, 16), 1, group, mock_device(0), lambda line: None)
