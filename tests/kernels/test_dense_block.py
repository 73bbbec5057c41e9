"""Fused dense blocks compute what plain ones compute: outputs, gradients and running statistics."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.comparing import difference, gradients_of
from torch import nn

from distrain.bench.network_costs import saved_bytes
from distrain.kernels import products
from distrain.kernels.choice import Kernels
from distrain.models import build, freeze, set_recomputation
from distrain.models.fusion import set_fused
from distrain.parallel.group import Group
from distrain.parallel.statistics import LaneStatistics

OPTIONS = {"depths": [3, 2], "growth_rate": 6, "stem_width": 10}


@dataclass
class Step:
    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def densenet(dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A DenseNet in training mode whose scales and shifts differ from their initial 1 and 0."""
    torch.manual_seed(0)
    network = build("densenet", 5, **{**OPTIONS, **options}).to(dtype).to(memory_format=torch.channels_last)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.5)
    return network


def take_step(network: nn.Module, images: torch.Tensor, precision: torch.dtype | None = None) -> Step:
    """Forward and backward pass of a copy. The gradient of the logits is the same in every precision."""
    network = copy.deepcopy(network)
    torch.manual_seed(5)
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        logits = network(images)
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype))
    return Step(logits.detach(), gradients_of(network), dict(network.named_buffers()))


def fused(network: nn.Module, compiled: bool = False) -> nn.Module:
    network = copy.deepcopy(network)
    set_fused(network, True, Kernels(compiled_passes=compiled))
    return network


def error(found: Step, expected: Step) -> float:
    """The error of all gradients together, relative to their norm."""
    squares = [
        ((found.gradients[name].double() - gradient.double()).square().sum(), gradient.double().square().sum())
        for name, gradient in expected.gradients.items()
    ]
    errors, sizes = (sum(column) for column in zip(*squares, strict=True))
    return float((errors / sizes).sqrt())


def assert_equal(found: Step, expected: Step, tolerance: float) -> None:
    assert difference(found.logits, expected.logits) <= tolerance
    assert error(found, expected) <= tolerance
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-6, atol=1e-6, msg=name)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    growth_rate=st.sampled_from([1, 12, 24, 32, 40, 48]),
    depths=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    stem_width=st.integers(
        2, 20
    ),  # with a single one, the layout of plain maps, which orders the draws of dropout, is open
    bottleneck=st.sampled_from([0, 1, 4]),
    dropout=st.sampled_from([0.0, 0.3]),
    placement=st.sampled_from(["paper", "torchvision"]),
    stem=st.sampled_from(["cifar", "imagenet"]),
    images=st.integers(1, 4),
    height=st.integers(9, 24),
    width=st.integers(9, 24),
    recomputed=st.booleans(),
    cached=st.sampled_from([0, 1 << 12, 1 << 30]),
)
def test_a_fused_network_computes_the_same_in_fp64(
    growth_rate, depths, stem_width, bottleneck, dropout, placement, stem, images, height, width, recomputed, cached
):
    network = densenet(
        growth_rate=growth_rate, depths=depths, stem_width=stem_width, bottleneck=bottleneck, dropout=dropout,
        dropout_placement=placement, stem=stem,
    )  # fmt: skip
    batch = torch.randn(images, 3, height, width, dtype=torch.float64)
    assume(images > 1 or min(height, width) >= 16)  # or there is one value a channel in the second block
    expected = take_step(network, batch)
    set_recomputation(network, "full" if recomputed else "none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_CACHED_BYTES", cached)
        assert_equal(take_step(fused(network), batch), expected, 1e-10)


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_the_maps_and_all_gradients_of_a_block_agree_to_1e_12(recomputed):
    block = densenet(depths=[6], growth_rate=8).blocks[0]
    set_recomputation(block, recomputed)
    x = torch.randn(3, 10, 7, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for one in (block, fused(block)):
        maps = one(x)
        gradient = torch.linspace(-1, 1, maps.numel(), dtype=torch.float64).view_as(maps)
        results.append([maps, *torch.autograd.grad(maps, [x, *one.parameters()], gradient)])
    assert max(difference(found, expected) for expected, found in zip(*results, strict=True)) <= 1e-12


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by torch's kernels", "compiled"]
)
@pytest.mark.parametrize("bottleneck", [0, 4])
def test_rounding_costs_no_more_than_in_a_plain_network(bottleneck, compiled):
    """The error against fp64 in every precision."""
    network = densenet(torch.float32, bottleneck=bottleneck)
    batch = torch.randn(8, 3, 40, 40)
    in_fp64 = copy.deepcopy(network).double()
    exact = take_step(in_fp64, batch.double())
    assert_equal(take_step(fused(in_fp64, compiled), batch.double()), exact, 1e-10)
    for precision in (None, torch.bfloat16, torch.float16):
        plain, found = (take_step(one, batch, precision) for one in (network, fused(network, compiled)))
        assert error(found, exact) <= 2 * error(plain, exact), precision
        assert found.logits.dtype == plain.logits.dtype
        assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_recomputing_what_is_between_two_convolutions_changes_no_bit(precision, dropout):
    network = fused(densenet(torch.float32, dropout=dropout))
    batch = torch.randn(4, 3, 32, 32)
    kept = take_step(network, batch, precision)
    set_recomputation(network, "full")
    again = take_step(network, batch, precision)
    assert torch.equal(again.logits, kept.logits)
    assert all(torch.equal(again.gradients[name], gradient) for name, gradient in kept.gradients.items())


def test_a_second_backward_pass_adds_the_same_gradients():
    network = fused(densenet())
    loss = network(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    first = {name: gradient.clone() for name, gradient in gradients_of(network).items()}
    loss.backward()
    assert all(torch.equal(gradient, 2 * first[name]) for name, gradient in gradients_of(network).items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_laid_out_as_their_parameters(layout):
    """Otherwise DDP copies them, and says so."""
    network = fused(densenet(torch.float32).to(memory_format=layout))
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    for name, gradient in gradients_of(network).items():
        assert gradient.stride() == network.get_parameter(name).stride(), name


def test_running_statistics_of_lanes_are_averaged_and_a_step_counts_once():
    results = []
    with Group() as group:
        for network in (densenet(torch.float32), fused(densenet(torch.float32))):
            statistics = LaneStatistics(network, group, 2, metrics=("loss",))
            for _ in range(3):
                statistics.begin_step()
                for lane in range(2):
                    network(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(lane)))
                    statistics.end_lane(loss=torch.zeros(()))
                statistics.end_step(torch.tensor(True))
            results.append(dict(network.named_buffers()))
    expected, found = results
    assert {int(buffer) for name, buffer in found.items() if name.endswith("num_batches_tracked")} == {3}
    for name, buffer in expected.items():
        torch.testing.assert_close(found[name], buffer, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_densenet121_saves_a_third_of_what_torchvisions_saves(precision):
    from torchvision.models import densenet121

    images = torch.randn(2, 3, 224, 224)

    def saved(network: nn.Module) -> int:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            return saved_bytes(lambda: network(images), network)

    network = fused(build("densenet121"))
    ours = saved(network)
    assert ours <= saved(densenet121(weights=None)) / 3
    set_recomputation(network, "full")
    assert saved(network) <= ours / 1.5


def calls_of(network: Any) -> list[str]:
    """Which blocks are computed layer by layer, found by a hook of their first layers."""
    calls: list[str] = []
    for name, block in network.blocks.named_children():
        block[0].register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_validation_frozen_blocks_and_cumulative_statistics_are_computed_layer_by_layer():
    network = fused(densenet(torch.float32))
    calls = calls_of(network)
    images = torch.randn(2, 3, 32, 32)
    network(images)
    assert calls == []
    network.eval()(images[:0])
    assert calls == ["0", "1"]
    calls.clear()
    freeze(network.train(), ["blocks.0"])
    network(images).sum().backward()
    assert calls == ["0"]
    assert network.blocks[0][0].conv1.weight.grad is None
    network.blocks[1][1].norm2.momentum = None
    network(images)
    assert calls == ["0", "0", "1"]


def test_a_single_value_a_channel_is_refused_as_in_a_plain_network():
    network = fused(densenet(torch.float32))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        network(torch.randn(1, 3, 8, 8))


def test_compiled_and_exported_networks_are_plain_ones():
    network = fused(densenet(torch.float32))
    images = torch.randn(2, 3, 32, 32)
    expected = take_step(network, images)
    norms: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        norms.extend(node for node in graph.graph.nodes if "batch_norm" in str(node.target))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend=backend)
    assert difference(compiled(images), expected.logits) <= 1e-5
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    network.eval()
    program = torch.export.export(network, (images,))
    assert difference(program.module()(images), network(images)) <= 1e-5


def test_200_steps_of_training_stay_on_the_curve_of_the_plain_network():
    """In fp32 with a small learning rate: the losses of single steps differ by rounding, their means do not."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (64,), generator=generator)
    images = torch.randn(64, 3, 16, 16, generator=generator)
    images[torch.arange(64), labels % 3] += (labels.view(-1, 1, 1) - 2.0) / 2
    curves = []
    for network in (densenet(torch.float32, stem="cifar"), fused(densenet(torch.float32, stem="cifar"))):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.005, momentum=0.9)
        losses = []
        for step in range(200):
            chosen = torch.arange(16) + 16 * (step % 4)
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses).view(10, 20).mean(dim=1))
    plain, found = curves
    assert plain[-1] < 0.5 * plain[0]
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0.01)
