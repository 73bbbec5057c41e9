"""The networks: DenseNet and RegNet, by name.

>>> distrain.models.build("regnety_16gf", num_classes=1000)
>>> distrain.models.build("densenet_bc_100_12", num_classes=10, dropout=0.2)
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from distrain.errors import UserError, nearest
from distrain.models.complexity import check_resolution
from distrain.models.densenet import DenseNet, DenseNetConfig, cifar_config
from distrain.models.freezing import freeze
from distrain.models.options import check, create
from distrain.models.published import PUBLISHED, Published
from distrain.models.recomputation import RECOMPUTATIONS, set_recomputation
from distrain.models.regnet import AnyNet, AnyNetConfig, RegNetConfig, StageConfig
from distrain.models.weights import load_weights, save_weights

__all__ = [
    "FREE",
    "PUBLISHED",
    "RECOMPUTATIONS",
    "AnyNet",
    "AnyNetConfig",
    "DenseNet",
    "DenseNetConfig",
    "Published",
    "RegNetConfig",
    "StageConfig",
    "build",
    "check_resolution",
    "freeze",
    "load_weights",
    "network_config",
    "save_weights",
    "set_recomputation",
]

Config = DenseNetConfig | RegNetConfig | AnyNetConfig

FREE: dict[str, type[Config]] = {"densenet": DenseNetConfig, "regnet": RegNetConfig, "anynet": AnyNetConfig}
"""Networks defined by options only."""

_CIFAR_NAME = re.compile(r"densenet(?:_(?P<variant>b|c|bc))?_(?P<depth>\d+)_(?P<growth_rate>\d+)")


def build(name: str, /, num_classes: int = 1000, **options: Any) -> nn.Module:
    """Build the network `name` with newly initialized weights, mapping images [n, 3, h, w] to logits [n, num_classes].

    `options` override fields of its configuration: DenseNetConfig, RegNetConfig or AnyNetConfig.
    Raises UserError for an unknown name, an unknown option or an invalid value.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UserError(f"num_classes={num_classes!r} must be an integer of at least 1")
    config = network_config(name, **options)
    if isinstance(config, DenseNetConfig):
        return DenseNet(config, num_classes)
    return AnyNet(config.anynet() if isinstance(config, RegNetConfig) else config, num_classes)


def network_config(name: str, /, **options: Any) -> Config:
    """Return the configuration of a network by name, overridden by `options`.

    A name is a published network, `densenet[_b|_c|_bc]_DEPTH_GROWTH` for small images, or `regnet`, `anynet`
    or `densenet`, which are defined by `options` only. Raises UserError as `build` does.
    """
    where = f"model {name}"
    if name in FREE:
        return create(FREE[name], options, where)
    if match := _CIFAR_NAME.fullmatch(name):
        config: Config = cifar_config(match["variant"] or "", int(match["depth"]), int(match["growth_rate"]))
    elif name in PUBLISHED:
        config = create(FREE[PUBLISHED[name].family], PUBLISHED[name].config, where)
    else:
        plain = re.sub(r"[-. ]", "_", name.lower())  # RegNetY-1.6GF, as the paper writes it
        raise UserError(f"model {name!r} is not known: {nearest(plain, [*PUBLISHED, *FREE])}")
    return replace(config, **check(type(config), options, where))
