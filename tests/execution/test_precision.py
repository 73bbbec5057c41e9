import pytest
import torch

from distrain.execution.precision import Autocast, LossScale


def test_the_loss_scale_changes_as_in_gradscaler():
    ours = LossScale("fp16", torch.device("cpu"))
    reference = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4100):
        finite = step not in (0, 1, 2050)
        reference.scale(weight * (1.0 if finite else torch.inf)).backward()
        reference.step(optimizer)
        reference.update()
        optimizer.zero_grad()
        ours.update(torch.tensor(finite))
        assert ours.value.item() == reference.get_scale()
    assert ours.value.item() == 2.0**15  # halved three times, doubled twice


def test_the_loss_scale_is_always_one_in_other_precisions():
    scale = LossScale("bf16", torch.device("cpu"))
    scale.update(torch.tensor(False))
    assert scale.value.item() == 1.0
    assert scale.state() == {}


@pytest.mark.parametrize("chosen", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("loaded", [torch.channels_last, torch.contiguous_format])
def test_images_are_in_the_memory_format_of_the_run_in_training_and_in_validation(chosen, loaded):
    formats = []
    layer = torch.nn.Conv2d(3, 2, 1)
    layer.register_forward_pre_hook(
        lambda module, inputs: formats.append(inputs[0].is_contiguous(memory_format=chosen))
    )
    network = Autocast(layer, "fp32", chosen)
    for mode in (True, False):
        network.train(mode)(torch.ones(2, 3, 4, 4).contiguous(memory_format=loaded))
    assert formats == [True, True]


def test_autocast_computes_in_the_precision_and_returns_fp32():
    dtypes = []
    layer = torch.nn.Conv2d(3, 2, 1)
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for precision in ("fp32", "bf16", "fp16"):
        assert Autocast(layer, precision, torch.contiguous_format)(torch.ones(2, 3, 4, 4)).dtype == torch.float32
    assert dtypes == [torch.float32, torch.bfloat16, torch.float16]
