"""The same weights give what torchvision and timm compute, in single precision."""

import gc
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from support.comparing import difference, differing
from torch import nn

from distrain.models import PUBLISHED, build, load_weights
from distrain.models.weights import translate_names

TOLERANCE = 1e-5


def in_torchvision(name: str) -> str:
    return name.replace("regnetx", "regnet_x").replace("regnety", "regnet_y")


def in_timm(name: str) -> str:
    """timm counts megaflops in hundreds: regnety_016 is the one of 1.6 GF."""
    size = re.fullmatch(r"(regnet[xy])_(\d+)_?(\d*)(mf|gf)", name)
    if size is None:
        return name
    flops = float(f"{size[2]}.{size[3] or 0}") * {"mf": 1, "gf": 1000}[size[4]]
    return f"{size[1]}_{round(flops / 100):03d}"


CASES = [
    *((name, "torchvision") for name in PUBLISHED if in_torchvision(name) in torchvision.models.list_models()),
    *((name, "timm") for name in PUBLISHED if in_timm(name) in timm.list_models()),
]


def cases(slow_above: float) -> list:
    """All of CASES; those of more multiply-adds are marked as slow."""
    marks = {name: [pytest.mark.slow] * (PUBLISHED[name].cost.flops > slow_above) for name, _ in CASES}
    return [pytest.param(case, id=f"{case[1]}-{case[0]}", marks=marks[case[0]]) for case in CASES]


@pytest.fixture(scope="module")
def pair(request) -> Iterator[tuple[nn.Module, nn.Module, dict[str, str]]]:
    """Our network and theirs with the same weights, and what they call our tensors."""
    name, library = request.param
    torch.manual_seed(0)
    rule = {"width_rule": "torchvision"} if PUBLISHED[name].torchvision_rule and library == "torchvision" else {}
    makers = {
        "torchvision": lambda: torchvision.models.get_model(in_torchvision(name), num_classes=10),
        "timm": lambda: timm.create_model(in_timm(name), num_classes=10),
    }
    theirs = makers[library]()
    randomize_norms(theirs)
    with torch.device("meta"):
        ours = build(name, 10, **rule)
    ours.to_empty(device="cpu")
    names = copy_weights(theirs, ours, library)
    yield ours, theirs, names
    del ours, theirs
    gc.collect()


def copy_weights(theirs: nn.Module, ours: nn.Module, library: str) -> dict[str, str]:
    """Give our network their weights, all of them; returns what they call ours."""
    names = translate_names(ours, library)
    weights = theirs.state_dict()
    ours.load_state_dict({mine: weights[foreign] for mine, foreign in names.items()})
    assert set(names.values()) == set(weights)
    return names


def randomize_norms(network: nn.Module) -> None:
    """Fresh ones hide what they multiply: timm starts the last gamma of a block at zero."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for positive in (norm.weight, norm.running_var):
                nn.init.uniform_(positive, 0.5, 1.5)
            for signed in (norm.bias, norm.running_mean):
                nn.init.normal_(signed, std=0.1)


def run(network: nn.Module, images: torch.Tensor, training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of a fixed projection of them."""
    network.train(training).zero_grad()
    logits = network(images)
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.9 * len(gradients)
    return logits.detach(), gradients


def compare(ours: nn.Module, theirs: nn.Module, names: dict[str, str], training: bool, resolution: int) -> None:
    images = torch.randn(2, 3, resolution, resolution)
    logits, gradients = run(ours, images, training)
    expected_logits, expected_gradients = run(theirs, images, training)
    assert difference(logits, expected_logits) <= TOLERANCE
    expected = {name: expected_gradients[names[name]] for name in gradients}
    assert differing(gradients, expected, TOLERANCE) == {}


def test_every_network_of_the_other_libraries_is_compared():
    assert Counter(library for _, library in CASES) == {"torchvision": 19, "timm": 29}


@pytest.mark.parametrize(("training", "resolution"), [(False, 64), (True, 75)], ids=["eval-64", "train-75"])
@pytest.mark.parametrize("pair", cases(slow_above=20e9), indirect=True)
def test_logits_and_gradients_equal_those_of_the_other_library(pair, training, resolution):
    compare(*pair, training, resolution)


@pytest.mark.parametrize(("training", "resolution"), [(False, 75), (True, 96)], ids=["eval-75", "train-96"])
@pytest.mark.parametrize("pair", cases(slow_above=3e9), indirect=True)
def test_they_are_equal_at_further_resolutions(pair, training, resolution):
    compare(*pair, training, resolution)


@pytest.mark.parametrize(("size", "batch"), [((224, 224), 1), ((71, 118), 3)], ids=["224", "71x118"])
@pytest.mark.parametrize("name", ["densenet121", "regnety_400mf"])
def test_logits_are_equal_at_other_sizes(name, size, batch, tmp_path):
    theirs = torchvision.models.get_model(in_torchvision(name)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = build(name).eval()
    load_weights(ours, tmp_path / "theirs.pth")
    images = torch.randn(batch, 3, *size)
    with torch.no_grad():
        assert difference(ours(images), theirs(images)) <= TOLERANCE


def test_dropout_after_layers_only_is_torchvisions():
    theirs = torchvision.models.densenet121(num_classes=10, drop_rate=0.3)
    ours = build("densenet121", 10, dropout=0.3, dropout_placement="torchvision")
    copy_weights(theirs, ours, "torchvision")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = theirs(images)
        torch.manual_seed(1)
        assert difference(ours(images), expected) <= TOLERANCE


def test_a_convolution_before_the_classifier_is_timms():
    theirs = timm.create_model("regnety_004", num_classes=10, num_features=64)
    ours = build("regnety_400mf", 10, head_width=64)
    randomize_norms(theirs)
    copy_weights(theirs, ours, "timm")
    images = torch.randn(2, 3, 64, 64)
    logits, expected = run(ours, images, True)[0], run(theirs, images, True)[0]
    assert difference(logits, expected) <= TOLERANCE
