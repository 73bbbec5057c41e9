"""The same weights give the same outputs and gradients as in torchvision and timm, in fp32."""

import gc
import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from support.comparing import difference, differing, gradients_of
from torch import nn

from distrain.models import PUBLISHED, build, load_weights
from distrain.models.weights import translate_names

TOLERANCE = 1e-5


def in_torchvision(name: str) -> str:
    return name.replace("regnetx", "regnet_x").replace("regnety", "regnet_y")


def in_timm(name: str) -> str:
    """timm names use units of 100 megaflops: regnety_016 has 1.6 GF."""
    size = re.fullmatch(r"(regnet[xy])_(\d+)_?(\d*)(mf|gf)", name)
    if size is None:
        return name
    flops = float(f"{size[2]}.{size[3] or 0}") * {"mf": 1, "gf": 1000}[size[4]]
    return f"{size[1]}_{round(flops / 100):03d}"


CASES = [
    *((name, "torchvision") for name in PUBLISHED if in_torchvision(name) in torchvision.models.list_models()),
    *((name, "timm") for name in PUBLISHED if in_timm(name) in timm.list_models()),
]


def cases(slow_above: float, up_to: float = math.inf) -> list:
    """Return CASES of up to `up_to` multiply-adds, with those of more than `slow_above` marked as slow."""
    flops = {name: PUBLISHED[name].cost.flops for name, _ in CASES}
    marks = {name: [pytest.mark.slow] * (flops[name] > slow_above) for name in flops}
    return [
        pytest.param(case, id=f"{case[1]}-{case[0]}", marks=marks[case[0]]) for case in CASES if flops[case[0]] <= up_to
    ]


@pytest.fixture(scope="module")
def pair(request) -> Iterator[tuple[nn.Module, nn.Module, dict[str, str]]]:
    """Yield our network and the library's with the same weights, and its names of our tensors."""
    name, library = request.param
    torch.manual_seed(0)
    rule = {"width_rule": "torchvision"} if PUBLISHED[name].torchvision_rule and library == "torchvision" else {}
    factories = {
        "torchvision": lambda: torchvision.models.get_model(in_torchvision(name), num_classes=10),
        "timm": lambda: timm.create_model(in_timm(name), num_classes=10),
    }
    reference = factories[library]()
    randomize_norms(reference)
    with torch.device("meta"):
        ours = build(name, 10, **rule)
    ours.to_empty(device="cpu")
    names = copy_weights(reference, ours, library)
    yield ours, reference, names
    del ours, reference
    gc.collect()


def copy_weights(reference: nn.Module, ours: nn.Module, library: str) -> dict[str, str]:
    """Copy all weights of the reference to our network; return its names of our tensors."""
    names = translate_names(ours, library)
    weights = reference.state_dict()
    ours.load_state_dict({mine: weights[foreign] for mine, foreign in names.items()})
    assert set(names.values()) == set(weights)
    return names


def randomize_norms(network: nn.Module) -> None:
    """Initial values would hide errors: timm initializes the last BN weight of a block to zero."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            for positive in (norm.weight, norm.running_var):
                nn.init.uniform_(positive, 0.5, 1.5)
            for signed in (norm.bias, norm.running_mean):
                nn.init.normal_(signed, std=0.1)


def run(network: nn.Module, images: torch.Tensor, training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits and gradients of a fixed projection of them."""
    network.train(training).zero_grad()
    logits = network(images)
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
    gradients = gradients_of(network)
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.9 * len(gradients)
    return logits.detach(), gradients


def compare(ours: nn.Module, reference: nn.Module, names: dict[str, str], training: bool, resolution: int) -> None:
    images = torch.randn(2, 3, resolution, resolution)
    logits, gradients = run(ours, images, training)
    expected_logits, expected_gradients = run(reference, images, training)
    assert difference(logits, expected_logits) <= TOLERANCE
    expected = {name: expected_gradients[names[name]] for name in gradients}
    assert differing(gradients, expected, TOLERANCE) == {}


def test_every_network_of_both_libraries_is_compared():
    assert Counter(library for _, library in CASES) == {"torchvision": 19, "timm": 29}


@pytest.mark.parametrize(("training", "resolution"), [(False, 64), (True, 75)], ids=["eval-64", "train-75"])
@pytest.mark.parametrize("pair", cases(slow_above=20e9), indirect=True)
def test_logits_and_gradients_equal_those_of_the_other_library(pair, training, resolution):
    compare(*pair, training, resolution)


@pytest.mark.parametrize(("training", "resolution"), [(False, 75), (True, 96)], ids=["eval-75", "train-96"])
@pytest.mark.parametrize("pair", cases(slow_above=3e9, up_to=20e9), indirect=True)
def test_they_are_equal_at_other_resolutions(pair, training, resolution):
    compare(*pair, training, resolution)


@pytest.mark.parametrize(("size", "batch"), [((224, 224), 1), ((71, 118), 3)], ids=["224", "71x118"])
@pytest.mark.parametrize("name", ["densenet121", "regnety_400mf"])
def test_logits_are_equal_for_other_image_shapes(name, size, batch, tmp_path):
    reference = torchvision.models.get_model(in_torchvision(name)).eval()
    torch.save(reference.state_dict(), tmp_path / "reference.pth")
    ours = build(name).eval()
    load_weights(ours, tmp_path / "reference.pth")
    images = torch.randn(batch, 3, *size)
    with torch.no_grad():
        assert difference(ours(images), reference(images)) <= TOLERANCE


def test_dropout_placement_torchvision_equals_torchvisions_dropout():
    reference = torchvision.models.densenet121(num_classes=10, drop_rate=0.3)
    ours = build("densenet121", 10, dropout=0.3, dropout_placement="torchvision")
    copy_weights(reference, ours, "torchvision")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = reference(images)
        torch.manual_seed(1)
        assert difference(ours(images), expected) <= TOLERANCE


def test_a_head_convolution_equals_timms():
    reference = timm.create_model("regnety_004", num_classes=10, num_features=64)
    ours = build("regnety_400mf", 10, head_width=64)
    randomize_norms(reference)
    copy_weights(reference, ours, "timm")
    images = torch.randn(2, 3, 64, 64)
    logits, expected = run(ours, images, True)[0], run(reference, images, True)[0]
    assert difference(logits, expected) <= TOLERANCE
