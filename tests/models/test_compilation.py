"""Networks work under torch's compilers, memory formats, reduced precision and without memory at all."""

import copy

import pytest
import torch
from torch import nn

from distrain.models import RECOMPUTATIONS, build, set_recomputation

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch.compiler.reset()


@pytest.fixture(
    params=[pytest.param("aot_eager"), pytest.param("inductor", marks=pytest.mark.slow)],
)
def backend(request) -> str:
    return request.param


def train_step(network: nn.Module, forward: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and then gradients and running statistics."""
    logits = forward(images)
    logits.square().mean().backward()
    return logits, [*(parameter.grad for parameter in network.parameters()), *network.buffers()]


@pytest.mark.parametrize("mode", RECOMPUTATIONS)
def test_compiled_training_agrees_with_eager(tiny, images, backend, mode):
    eager = copy.deepcopy(tiny)
    expected_logits, expected = train_step(eager, eager, images)
    set_recomputation(tiny, mode)
    logits, found = train_step(tiny, torch.compile(tiny, fullgraph=True, backend=backend), images)
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_compiled_evaluation_agrees_with_eager(tiny, images, backend):
    tiny.eval()
    compiled = torch.compile(tiny, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), tiny(images), **TOLERANCE)


def test_full_size_networks_compile_without_graph_breaks():
    network = build("regnety_400mf", 10)
    torch.compile(network, fullgraph=True, backend="eager")(torch.randn(2, 3, 32, 32)).sum().backward()
    assert network.stem.conv.weight.grad is not None


def test_exported_programs_agree_with_eager_at_any_batch_size(tiny, images):
    tiny.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(tiny, (images,), dynamic_shapes=({0: batch},))
    others = torch.randn(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(others), tiny(others), **TOLERANCE)


def test_channels_last_gives_the_same_and_stays_channels_last(tiny, images):
    changed = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    inputs = images.to(memory_format=torch.channels_last)
    logits, found = train_step(changed, changed, inputs)
    expected_logits, expected = train_step(tiny, tiny, images)
    torch.testing.assert_close(logits, expected_logits, **TOLERANCE)
    torch.testing.assert_close(found, expected, **TOLERANCE, check_stride=False)
    assert changed.stem(inputs).is_contiguous(memory_format=torch.channels_last)


def test_autocast_computes_in_half_precision_close_to_full(tiny, images):
    expected = tiny(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = tiny(images)
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in tiny.parameters())
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["densenet264", "regnety_128gf", "densenet_bc_190_40"])
def test_networks_of_any_size_run_on_the_meta_device(name):
    with torch.device("meta"):
        assert build(name)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
