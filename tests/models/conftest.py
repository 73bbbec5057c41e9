from typing import Any

import pytest
import torch
from torch import nn

from distrain.models import build

TINY_DENSENET: tuple[str, dict[str, Any]] = ("densenet_bc_16_4", {})
TINY_REGNET: tuple[str, dict[str, Any]] = (
    "regnet",
    {"depth": 4, "w0": 16, "wa": 8.0, "wm": 2.0, "group_width": 8, "se_ratio": 0.25, "stem": "cifar"},
)


@pytest.fixture(params=[TINY_DENSENET, TINY_REGNET], ids=["densenet", "regnet"])
def tiny(request) -> nn.Module:
    """One network per family, small enough to compile, for images of 16 pixels."""
    name, options = request.param
    return build(name, num_classes=5, **options)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)
