import pytest
import timm.utils.agc
import torch

from distrain import config, models
from distrain.config import OptimizerConfig
from distrain.errors import UserError
from distrain.recipe.optimizers import build_optimizer, init_state, update_clipped


def decayed(config: OptimizerConfig) -> set[str]:
    """Names of the parameters that a step with zero gradients changes."""
    network = models.build("densenet_bc_10_4", 3)
    torch.nn.init.ones_(network.get_parameter("head.bias"))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name for name, parameter in network.named_parameters() if not torch.equal(before[name], parameter)}


def test_norms_and_biases_decay_only_if_configured():
    names = dict(models.build("densenet_bc_10_4", 3).named_parameters())
    weights = {name for name in names if "conv" in name or name == "head.weight"}
    assert decayed(OptimizerConfig(weight_decay=0.1, decay_norms=False)) == weights
    scales = {name for name in names if "norm" in name and name.endswith("weight")} | {"head.bias"}
    assert decayed(OptimizerConfig(weight_decay=0.1, decay_norms=True)) == weights | scales


def test_what_is_named_does_not_decay():
    assert decayed(OptimizerConfig(weight_decay=0.1, decay_norms=False, no_decay=["*", "!head"])) == {"head.weight"}
    everything = decayed(OptimizerConfig(weight_decay=0.1))
    assert decayed(OptimizerConfig(weight_decay=0.1, no_decay=["head"])) == everything - {"head.weight", "head.bias"}
    with pytest.raises(UserError, match=r"optimizer.no_decay: hed names no part of this network: did you mean head"):
        decayed(OptimizerConfig(no_decay=["hed"]))


SCALE = 64.0


def clipped(config: OptimizerConfig) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """The gradients that `config` made of large ones, and those; the norm that it reported."""
    torch.manual_seed(0)
    network = models.build("densenet_bc_10_4", 3)
    parameters = list(network.parameters())
    before = [torch.randn_like(parameter) * 10 ** (number % 5 - 3) for number, parameter in enumerate(parameters)]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient * SCALE
    weights = [parameter.detach().clone() for parameter in parameters]
    optimizer = build_optimizer(network, config)
    init_state(optimizer)
    norm, finite = update_clipped(optimizer, dict(network.named_parameters()), 1.0, torch.tensor(SCALE), config)
    assert finite
    steps = [old - new.detach() for old, new in zip(weights, parameters, strict=True)]
    return steps, before, float(norm)


PLAIN = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}


def test_elements_of_the_gradient_are_clipped_to_a_value():
    steps, before, norm = clipped(OptimizerConfig(clip_value=0.5, **PLAIN))
    for step, gradient in zip(steps, before, strict=True):
        torch.testing.assert_close(step, gradient.clamp(-0.5, 0.5), rtol=1e-4, atol=1e-6)
    assert norm == pytest.approx(float(torch.cat([one.flatten() for one in before]).norm()), rel=1e-5)


def test_adaptive_clipping_is_that_of_timm():
    steps, before, _ = clipped(OptimizerConfig(clip_agc=0.02, **PLAIN))
    torch.manual_seed(0)
    parameters = list(models.build("densenet_bc_10_4", 3).parameters())
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient.clone()
    timm.utils.agc.adaptive_clip_grad(parameters[:-2], clip_factor=0.02)
    assert sum(not torch.equal(one.grad, other) for one, other in zip(parameters, before, strict=True)) > 5
    for step, parameter in zip(steps, parameters, strict=True):
        torch.testing.assert_close(step, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimizer.clip_norm=1", "optimizer.clip_agc=0.1"), "clip_norm, clip_value and clip_agc cannot be combined"),
        (
            ("optimizer.clip_agc=0.1", "parallel.strategy=zero2"),
            "optimizer.clip_agc needs whole gradients, which parallel.strategy=zero2 partitions: use ddp or zero0",
        ),
    ],
)
def test_clipping_that_cannot_be_done_is_one_line(words, message):
    required = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]
    with pytest.raises(UserError, match=message):
        config.load(None, [*required, *words])
