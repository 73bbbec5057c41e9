import torch

from distrain import models
from distrain.config import OptimizerConfig
from distrain.recipe.optimizers import build_optimizer


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
