"""Recomputation changes memory only: results are bit-identical."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.comparing import gradients_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrain.errors import UserError
from distrain.models import build, set_recomputation

MODES = ["full", "selective"]
NETWORKS: dict[str, dict[str, Any]] = {
    "densenet_bc_22_12": {"dropout": 0.2},
    "densenet_16_8": {"dropout": 0.2},
    "regnet": {
        **{"depth": 5, "w0": 16, "wa": 8.0, "wm": 2.0, "group_width": 8, "se_ratio": 0.25, "stem": "cifar"},
        **{"drop_path": 0.4, "head_dropout": 0.2},
    },
}


@dataclass
class Step:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        return [self.loss, *self.gradients.values(), *self.buffers.values()]


class OperationRecorder(TorchDispatchMode):
    """Counts operations and tracks the memory of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()
        self.results: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        self.counts[operation] += 1
        for storage in (result.untyped_storage() for result in tree_leaves(results) if result is not None):
            self.results[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return results

    def live_bytes(self) -> int:
        """Return the memory of all results that are still referenced."""
        return sum(nbytes for storage, nbytes in self.results.values() if not storage.expired())


def take_step(network: nn.Module, images: torch.Tensor, half: bool = False) -> Step:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = network(images).float().square().mean()
    loss.backward()
    return Step(loss, gradients_of(network), dict(network.named_buffers()))


def saved_bytes(network: nn.Module, images: torch.Tensor, mode: str) -> int:
    """Return the memory saved in the forward pass for the backward pass."""
    set_recomputation(network, mode)
    with OperationRecorder() as forward:
        loss = network(images).sum()
        saved = forward.live_bytes()
    assert loss.requires_grad
    return saved


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    return build(request.param, 10, **NETWORKS[request.param]).to(memory_format=torch.channels_last)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_running_statistics_are_bit_identical(network, images, mode, half):
    changed = copy.deepcopy(network)
    set_recomputation(changed, mode)
    expected, step = take_step(network, images, half), take_step(changed, images, half)
    assert all(torch.equal(a, b) for a, b in zip(step.tensors(), expected.tensors(), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_step_counts_as_one_batch(network, images, mode):
    set_recomputation(network, mode)
    buffers = take_step(network, images).buffers
    assert {int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize("mode", MODES)
def test_buffers_stay_the_same_objects(network, images, mode):
    """Other code keeps references to them, such as the averaging of statistics over lanes."""
    set_recomputation(network, mode)
    before = [id(buffer) for buffer in network.buffers()]
    take_step(network, images)
    assert [id(buffer) for buffer in network.buffers()] == before


@pytest.mark.parametrize("mode", MODES)
def test_parameter_names_stay_the_same(network, mode):
    before = list(network.state_dict())
    set_recomputation(network, mode)
    assert list(network.state_dict()) == before


@pytest.mark.parametrize("name", ["densenet_bc_22_12", "regnety_200mf"])
def test_selective_saves_memory_and_full_saves_more(name):
    network, images = build(name, 10), torch.randn(2, 3, 64, 64)
    none, selective, full = (saved_bytes(network, images, mode) for mode in ("none", "selective", "full"))
    assert selective < 0.7 * none
    assert full < 0.7 * selective


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["densenet_bc_22_12", "regnety_200mf"])
def test_selective_recomputation_runs_norms_again_but_no_convolution(name, layout, half):
    network = build(name, 10).to(memory_format=layout)
    set_recomputation(network, "selective")
    with OperationRecorder() as step:
        take_step(network, torch.randn(2, 3, 32, 32).to(memory_format=layout), half)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    norms_in_blocks = [name for name in norms if name.startswith(("blocks.", "stages."))]
    assert step.counts[torch.ops.aten.convolution.default] == convolutions
    assert step.counts[torch.ops.aten.native_batch_norm.default] == len(norms) + len(norms_in_blocks)


def backward_twice(network: nn.Module, images: torch.Tensor) -> Step:
    torch.manual_seed(7)
    loss = network(images).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    return Step(loss, gradients_of(network), dict(network.named_buffers()))


def test_full_recomputation_supports_a_second_backward_pass(network, images):
    changed = copy.deepcopy(network)
    set_recomputation(changed, "full")
    before = [id(buffer) for buffer in changed.buffers()]
    expected, step = backward_twice(network, images), backward_twice(changed, images)
    assert all(torch.equal(a, b) for a, b in zip(step.tensors(), expected.tensors(), strict=True))
    assert [id(buffer) for buffer in changed.buffers()] == before


def test_torch_rejects_a_second_backward_pass_with_selective_and_buffers_are_restored(network, images):
    changed = copy.deepcopy(network)
    set_recomputation(changed, "selective")
    before = [id(buffer) for buffer in changed.buffers()]
    with pytest.raises(RuntimeError, match="backward an extra time"):
        backward_twice(changed, images)
    assert [id(buffer) for buffer in changed.buffers()] == before


@pytest.mark.parametrize("mode", MODES)
def test_recomputation_can_be_turned_off_again(network, images, mode):
    expected = take_step(copy.deepcopy(network), images)
    set_recomputation(network, mode)
    set_recomputation(network, "none")
    assert all(torch.equal(a, b) for a, b in zip(take_step(network, images).tensors(), expected.tensors(), strict=True))


def test_an_unknown_mode_is_rejected_with_a_suggestion(network):
    with pytest.raises(UserError, match="'ful' is not known: did you mean full"):
        set_recomputation(network, "ful")


@pytest.mark.parametrize(("options", "random_blocks"), [({}, 0), ({"drop_path": 0.4}, 4)])
def test_the_state_of_the_generator_is_kept_only_for_blocks_that_draw_from_it(options, random_blocks, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(1) or torch.default_generator.get_state())
    network = build("regnet", 10, depth=5, w0=16, wa=8.0, wm=2.0, group_width=8, stem="cifar", **options)
    set_recomputation(network, "full")
    network(torch.randn(2, 3, 16, 16))
    assert len(calls) == random_blocks  # the first block has a probability of 0
