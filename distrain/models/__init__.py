"""The networks: DenseNet and RegNet, by name.

    distrain.models.build("regnety_16gf", num_classes=1000)
    distrain.models.build("densenet_bc_100_12", num_classes=10, dropout=0.2)
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from distrain.errors import UserError, nearest
from distrain.models.densenet import DenseNet, DenseNetConfig, cifar_depths
from distrain.models.layers import set_recomputation
from distrain.models.regnet import AnyNet, AnyNetConfig, RegNetConfig, StageConfig

__all__ = [
    "PUBLISHED",
    "AnyNet",
    "AnyNetConfig",
    "DenseNet",
    "DenseNetConfig",
    "Published",
    "RegNetConfig",
    "StageConfig",
    "build",
    "configure",
    "set_recomputation",
]

Config = DenseNetConfig | RegNetConfig | AnyNetConfig

_CIFAR_NAME = re.compile(r"densenet(?:_(?P<variant>b|c|bc))?_(?P<depth>\d+)_(?P<growth>\d+)")


@dataclass(frozen=True)
class Published:
    """A network somebody has published, with its exact cost at 224 pixels (32 for the CIFAR ones) and the top-1
    accuracy in percent that `source` reports for it, if any."""

    family: str
    flops: int
    params: int
    activations: int
    top1: float | None
    source: str
    config: dict[str, Any]

    @property
    def resolution(self) -> int:
        return 32 if self.family == "densenet_cifar" else 224

    @property
    def num_classes(self) -> int:
        return 10 if self.family == "densenet_cifar" else 1000


def _read_published() -> dict[str, Published]:
    table = json.loads(Path(__file__).with_name("published.json").read_text())
    return {name: Published(**{"config": {}, **entry}) for name, entry in table.items()}


PUBLISHED = _read_published()


def build(name: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """The network `name` with fresh weights, mapping images [n, 3, h, w] to logits [n, num_classes].

    `options` change fields of its configuration (DenseNetConfig, RegNetConfig, AnyNetConfig). Raises UserError
    for an unknown name or option and for values that make no network.
    """
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes} must be at least 1")
    config = configure(name, **options)
    if isinstance(config, DenseNetConfig):
        return DenseNet(config, num_classes)
    return AnyNet(config.anynet() if isinstance(config, RegNetConfig) else config, num_classes)


def configure(name: str, **options: Any) -> Config:
    """The configuration behind a name: a published network, `densenet[_b|_c|_bc]_DEPTH_GROWTH` for small images,
    or `regnet`, `anynet` and `densenet`, which take all they need from `options`."""
    if match := _CIFAR_NAME.fullmatch(name):
        return _change(name, _cifar_densenet(match["variant"] or "", int(match["depth"]), int(match["growth"])), options)
    if name in _FREE:
        return _create(name, _FREE[name], options)
    if name not in PUBLISHED:
        raise UserError(f"model {name!r} is not known: {nearest(name, [*PUBLISHED, *_FREE])}")
    published = PUBLISHED[name]
    return _change(name, _create(name, _FREE[published.family], published.config), options)


_FREE: dict[str, type[Config]] = {"densenet": DenseNetConfig, "regnet": RegNetConfig, "anynet": AnyNetConfig}


def _cifar_densenet(variant: str, depth: int, growth: int) -> DenseNetConfig:
    """Sections 3 and 4.2: 16 maps enter the first block, or 2k in DenseNet-BC."""
    has_bottleneck = "b" in variant
    return DenseNetConfig(
        depths=cifar_depths(depth, has_bottleneck),
        growth_rate=growth,
        stem_width=2 * growth if variant == "bc" else 16,
        stem="cifar",
        bottleneck=4 if has_bottleneck else 0,
        compression=0.5 if "c" in variant else 1.0,
    )


def _create(name: str, kind: type[Config], options: dict[str, Any]) -> Config:
    try:
        return kind(**_checked(name, kind, options))
    except TypeError as error:  # dataclasses say so when a field without default is missing
        missing = str(error).partition("argument")[2].lstrip("s: ")
        raise UserError(f"model {name!r} needs options that were not given: {missing}") from error


def _change(name: str, config: Config, options: dict[str, Any]) -> Config:
    return replace(config, **_checked(name, type(config), options))


def _checked(name: str, kind: type[Config], options: dict[str, Any]) -> dict[str, Any]:
    """Options with lists, as YAML has them, made into what the configuration holds."""
    known = {entry.name: entry.type for entry in fields(kind)}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"model {name!r} has no option {key!r}: {nearest(key, known)}")
        if key == "stages":
            checked[key] = tuple(stage if isinstance(stage, StageConfig) else StageConfig(**stage) for stage in value)
        else:
            checked[key] = tuple(value) if isinstance(value, list) else value
    return checked
