import pytest
import torch
from support.execution import NETWORK

from distrain import models


@pytest.fixture
def network() -> torch.nn.Module:
    return models.build(NETWORK, 5)
