"""The published networks with their complexity and accuracy: one table for code, listing and tests."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrain.models.complexity import Cost


@dataclass(frozen=True)
class Published:
    """A published network. Accuracies are top-1, percent, single center crop."""

    family: str
    """densenet or regnet, built from `config`; or densenet_cifar, built from its name."""
    cost: Cost
    """For one image of `resolution` x `resolution` pixels and `num_classes` classes."""
    top1: float
    """As reported by `source`."""
    source: str
    """pycls: the RegNet authors' model zoo. authors: the DenseNet authors' repository. paper: the DenseNet
    paper, on CIFAR-10 with crop and flip augmentation. SWAG: torchvision's linear classifier on features
    learned from weakly supervised images."""
    torchvision: dict[str, float] = field(default_factory=dict)
    """Accuracy of torchvision's weights V1 and V2, if torchvision has this network."""
    torchvision_rule: bool = False
    """Whether torchvision's network of this name needs width_rule=torchvision."""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def resolution(self) -> int:
        return 32 if self.family == "densenet_cifar" else 224

    @property
    def num_classes(self) -> int:
        return 10 if self.family == "densenet_cifar" else 1000


def _read() -> dict[str, Published]:
    table = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {name: Published(**{**entry, "cost": Cost(**entry["cost"])}) for name, entry in table.items()}


PUBLISHED = _read()
