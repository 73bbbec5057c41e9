import weakref

import pytest
import torch
from support.execution import kept_bytes, modes, settings

from distrain.errors import UserError
from distrain.execution.fitting import TrialStep, fit_memory
from distrain.execution.prepare import reserved_bytes
from distrain.execution.recomputation import count_kept_bytes
from distrain.execution.trial import example_images


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


CUDNN = "GET was unable to find an engine to execute this computation"


@pytest.mark.parametrize(
    "message", [CUDNN, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_libraries_that_run_out_of_memory_on_a_simulated_gpu_are_recognized(network, group, message):
    def trial_step(network, images):
        if len(images) > 4:
            raise RuntimeError(message)

    assert fit_memory(network, torch.randn(8, 3, 16, 16), 1, group, trial_step, print) == 2


def test_other_errors_of_a_trial_are_raised(network, group):
    def trial_step(network, images):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        fit_memory(network, torch.randn(8, 3, 16, 16), 1, group, trial_step, print)


class Cycle:
    """Like a learner that was rolled back: only the garbage collector finds out that nobody needs it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_left_in_reference_cycles_is_released_before_a_trial(network, group):
    left = weakref.ref(Cycle())
    found = []
    fit_memory(network, torch.randn(8, 3, 16, 16), 1, group, lambda *_: found.append(left()), print)
    assert found == [None]


@pytest.mark.parametrize(
    ("words", "copies"),
    [
        (("optimizer.name=sgd",), 0),  # the copy of the network on which a trial is counts for it
        (("optimizer.name=adamw",), 1),
        (("optimizer.name=adamw", "ema.decay=0.9"), 2),
        (("optimizer.name=adamw", "parallel.strategy=zero1", "parallel.offload=true", "ema.decay=0.9"), 0),
    ],
)
def test_a_trial_leaves_room_for_what_training_keeps(network, group, tmp_path, words, copies):
    weights = sum(parameter.nbytes for parameter in network.parameters())
    base = reserved_bytes(settings(tmp_path, "optimizer.name=sgd"), network, group)
    assert reserved_bytes(settings(tmp_path, *words), network, group) - base == copies * weights


def test_memory_is_tried_with_the_largest_images_of_the_run(tmp_path):
    run = settings(tmp_path, "data.size_schedule=[[0, 48], [1, 16]]")
    assert example_images(run, torch.device("cpu"), torch.contiguous_format).shape[-1] == 48
