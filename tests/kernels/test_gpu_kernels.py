"""Dense blocks on a GPU, in every kind, in bf16 and fp32."""

import copy

import pytest
import torch
from support.comparing import gradients_of

from distrain.kernels.choice import KERNELS
from distrain.models import build
from distrain.models.fusion import set_fused

pytestmark = pytest.mark.gpu


def gradients(network: torch.nn.Module, images: torch.Tensor, half: bool) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        logits = network(images)
    logits.backward(torch.linspace(-1, 1, logits.numel(), device="cuda").view_as(logits).to(logits.dtype))
    return torch.cat([gradient.double().flatten() for gradient in gradients_of(network).values()])


@pytest.mark.parametrize("compiled", [False, True], ids=["by torch's kernels", "compiled"])
@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("growth_rate", [24, 32, 48])
def test_a_fused_network_is_as_exact_as_a_plain_one_on_a_gpu(group, growth_rate, kind, compiled):
    torch.manual_seed(0)
    plain = build("densenet", 5, depths=[4, 3], growth_rate=growth_rate, stem_width=64)
    plain = plain.to(group.device).to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    set_fused(fused, True, KERNELS[kind]._replace(compiled_passes=compiled))
    images = torch.randn(16, 3, 64, 64, device=group.device)
    exact = gradients(copy.deepcopy(plain).double(), images.double(), half=False)
    for half in (False, True):
        expected, found = (gradients(copy.deepcopy(one), images, half) for one in (plain, fused))
        assert (found - exact).norm() <= 2 * (expected - exact).norm(), half
        again = gradients(copy.deepcopy(fused), images, half)
        assert torch.equal(again, found) or kind != "triton"
