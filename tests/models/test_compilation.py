"""Networks work with torch.compile, torch.export, memory formats, autocast and the meta device."""

import copy

import pytest
import torch
from support.comparing import difference, differing
from torch import nn

from distrain.models import RECOMPUTATIONS, build, set_recomputation

TOLERANCE = 1e-5
"""Relative to the largest value of each tensor."""


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()


@pytest.fixture(
    params=[pytest.param("aot_eager"), pytest.param("inductor", marks=pytest.mark.slow)],
)
def backend(request) -> str:
    return request.param


def train_step(network: nn.Module, forward: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return logits, gradients of a fixed projection of them, and running statistics."""
    logits = forward(images)
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"logits": logits, **gradients, **dict(network.named_buffers())}


@pytest.mark.parametrize("mode", RECOMPUTATIONS)
def test_compiled_training_agrees_with_eager(tiny, images, backend, mode):
    eager = copy.deepcopy(tiny)
    expected = train_step(eager, eager, images)
    set_recomputation(tiny, mode)
    found = train_step(tiny, torch.compile(tiny, fullgraph=True, backend=backend), images)
    assert differing(found, expected, TOLERANCE) == {}


def test_compiled_evaluation_agrees_with_eager(tiny, images, backend):
    tiny.eval()
    compiled = torch.compile(tiny, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert difference(compiled(images), tiny(images)) <= TOLERANCE


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["regnety_400mf", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_full_size_networks_compile_without_graph_breaks(name, training):
    network = build(name, 10).train(training)
    torch.compile(network, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32)).sum().backward()
    assert network.stem.conv.weight.grad is not None


def test_exported_programs_agree_with_eager_at_any_batch_size(tiny, images):
    tiny.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(tiny, (images,), dynamic_shapes=({0: batch},))
    others = torch.randn(7, 3, 16, 16)
    assert difference(program.module()(others), tiny(others)) <= TOLERANCE


def test_channels_last_gives_the_same_results_and_stays_channels_last(tiny, images):
    changed = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    layouts = {}

    def observe(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            layouts[name] = output.dim() < 4 or output.is_contiguous(memory_format=torch.channels_last)

        module.register_forward_hook(hook)

    for name, module in changed.named_modules():
        observe(name, module)
    found = train_step(changed, changed, images.to(memory_format=torch.channels_last))
    assert differing(found, train_step(tiny, tiny, images), TOLERANCE) == {}
    assert len(layouts) > len(list(changed.parameters())) / 2
    assert [name for name, is_channels_last in layouts.items() if not is_channels_last] == []


def test_autocast_computes_in_bf16_close_to_fp32(tiny, images):
    expected = tiny(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = tiny(images)
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in tiny.parameters())
    assert difference(logits.float(), expected) <= 0.05


@pytest.mark.parametrize("name", ["densenet264", "regnety_128gf", "densenet_bc_190_40"])
def test_networks_of_any_size_run_on_the_meta_device(name):
    with torch.device("meta"):
        assert build(name)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
