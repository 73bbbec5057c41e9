"""Computing activations again changes memory, and nothing else to the last bit."""

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.errors import UserError
from distrain.models import build, set_recomputation

MODES = ["block", "selective"]
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


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation] += 1
        return operation(*args, **(kwargs or {}))


def take_step(network: nn.Module, images: torch.Tensor, half: bool = False) -> Step:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = network(images).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return Step(loss, gradients, dict(network.named_buffers()))


def count_kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, weights and buffers aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = network(images).sum()
    total = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    del loss
    return total


@pytest.fixture(params=NETWORKS)
def network(request) -> nn.Module:
    return build(request.param, 10, **NETWORKS[request.param]).to(memory_format=torch.channels_last)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_and_running_statistics_are_the_same_bits(network, images, mode, half):
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
    """Whoever holds on to them, as the averaging of statistics over lanes does, sees their updates."""
    set_recomputation(network, mode)
    before = [id(buffer) for buffer in network.buffers()]
    take_step(network, images)
    assert [id(buffer) for buffer in network.buffers()] == before


@pytest.mark.parametrize("mode", MODES)
def test_names_of_parameters_stay(network, mode):
    before = list(network.state_dict())
    set_recomputation(network, mode)
    assert list(network.state_dict()) == before


@pytest.mark.parametrize("name", ["densenet_bc_22_12", "regnety_200mf"])
def test_recomputing_blocks_keeps_less_than_half(name):
    network, images = build(name, 10), torch.randn(2, 3, 64, 64)
    everything = count_kept_bytes(network, images)
    set_recomputation(network, "block")
    assert count_kept_bytes(network, images) < everything / 2


def test_recomputing_selectively_does_not_run_convolutions_again(images):
    network = build("densenet_bc_22_12", 10)
    set_recomputation(network, "selective")
    with CountOperations() as runs:
        network(images).sum().backward()
    modules = Counter(type(module) for module in network.modules())
    norms_in_blocks = sum(isinstance(module, nn.BatchNorm2d) for module in network.blocks.modules())
    assert runs.counts[torch.ops.aten.convolution.default] == modules[nn.Conv2d]
    assert runs.counts[torch.ops.aten.native_batch_norm.default] == modules[nn.BatchNorm2d] + norms_in_blocks


@pytest.mark.parametrize("mode", MODES)
def test_it_can_be_taken_back(network, images, mode):
    expected = take_step(copy.deepcopy(network), images)
    set_recomputation(network, mode)
    set_recomputation(network, "none")
    assert all(torch.equal(a, b) for a, b in zip(take_step(network, images).tensors(), expected.tensors(), strict=True))


def test_an_unknown_mode_is_named_with_the_nearest(network):
    with pytest.raises(UserError, match="'blocks' is not known: did you mean block"):
        set_recomputation(network, "blocks")
