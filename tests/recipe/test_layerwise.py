"""Optimizers against timm's and torch's."""

import copy

import pytest
import torch
from timm.optim import Lamb, Lars

from distrain.config import OptimizerConfig
from distrain.recipe.optimizers import build_optimizer, init_state, set_lr, update_clipped

NETWORK = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Tanh(), torch.nn.Linear(5, 3, bias=False))


def train(network: torch.nn.Module, step) -> list[torch.Tensor]:
    for number in range(5):
        network.zero_grad()
        generator = torch.Generator().manual_seed(number)
        (0.01 * network(torch.randn(8, 6, generator=generator)).square().sum()).backward()  # norms of less than 1
        step()
    return [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize(
    ("ours", "other_library"),
    [
        (
            {"name": "lars", "momentum": 0.9, "nesterov": True, "trust": 0.01, "weight_decay": 0.1},
            lambda parameters: Lars(
                parameters, lr=0.5, momentum=0.9, nesterov=True, trust_coeff=0.01, weight_decay=0.1, always_adapt=True
            ),
        ),
        (
            {"name": "lamb", "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1},
            lambda parameters: Lamb(
                parameters, lr=0.5, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, max_grad_norm=None
            ),
        ),
        (
            {"name": "adamw", "betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.1},
            lambda parameters: torch.optim.AdamW(parameters, lr=0.5, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_optimizers_match_those_of_other_libraries(ours, other_library):
    mine, other = copy.deepcopy(NETWORK), copy.deepcopy(NETWORK)
    optimizer = build_optimizer(mine, OptimizerConfig(**ours))
    init_state(optimizer)
    set_lr(optimizer, 0.5)
    reference = other_library(other.parameters())
    for found, expected in zip(train(mine, optimizer.step), train(other, reference.step), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize(("weights", "gradients"), [(0.0, 1.0), (1.0, 0.0)])
def test_layers_whose_weights_or_gradients_are_zero_take_the_plain_step(name, weights, gradients):
    layer = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.constant_(layer.weight, weights)
    layer.weight.grad = torch.full_like(layer.weight, gradients)
    config = OptimizerConfig(name=name, weight_decay=0.0, momentum=0.5, nesterov=False, eps=0.0 if gradients else 1e-8)
    optimizer = build_optimizer(layer, config)
    init_state(optimizer)
    set_lr(optimizer, 0.1)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full_like(layer.weight, weights - 0.1 * gradients))


@pytest.mark.parametrize(("name", "plain"), [("lars", "sgd"), ("lamb", "adamw")])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_vectors_take_the_steps_of_the_plain_optimizer(name, plain, momentum):
    bias = torch.nn.Linear(1, 4)
    del bias.weight
    biases = copy.deepcopy(bias), copy.deepcopy(bias)
    for network, kind in zip(biases, (name, plain), strict=True):
        settings = {"weight_decay": 0.1, "decay_norms": True, "momentum": momentum, "nesterov": False}
        optimizer = build_optimizer(network, OptimizerConfig(name=kind, **settings))
        init_state(optimizer)
        set_lr(optimizer, 0.1)
        for number in range(3):
            network.bias.grad = torch.linspace(-1, 2, 4) * (number + 1)
            optimizer.step()
    torch.testing.assert_close(biases[0].bias, biases[1].bias, rtol=1e-4, atol=1e-5)
    assert not torch.equal(biases[0].bias, bias.bias)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_gradients_are_unscaled_and_clipped_and_the_step_is_skipped_if_they_are_not_finite(name):
    scaled, plain = copy.deepcopy(NETWORK), copy.deepcopy(NETWORK)
    optimizers = [build_optimizer(network, OptimizerConfig(name=name)) for network in (scaled, plain)]
    for optimizer in optimizers:
        init_state(optimizer)
    images = torch.randn(8, 6)
    (scaled(images).square().sum() * 64).backward()
    plain(images).square().sum().backward()
    length = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    set_lr(optimizers[1], 0.1)
    optimizers[1].step()
    parameters, clipping = dict(scaled.named_parameters()), OptimizerConfig(clip_norm=0.5)
    norm, finite = update_clipped(optimizers[0], parameters, 0.1, torch.tensor(64.0), clipping)
    assert finite
    torch.testing.assert_close(norm, length)
    for found, expected in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    before = [parameter.detach().clone() for parameter in scaled.parameters()]
    state = copy.deepcopy([*optimizers[0].state.values()])
    next(scaled.parameters()).grad[0, 0] = torch.inf
    _, finite = update_clipped(optimizers[0], parameters, 0.1, torch.tensor(64.0), clipping)
    assert not finite
    assert all(torch.equal(old, new) for old, new in zip(before, scaled.parameters(), strict=True))
    for old, new in zip(state, optimizers[0].state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
