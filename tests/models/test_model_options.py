"""Effects of model options, and messages for invalid ones."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from distrain.errors import UserError
from distrain.models import DenseNetConfig, StageConfig, build, check_resolution, network_config
from distrain.models.regnet import drop_path, drop_path_rates

STAGES = [{"depth": 1, "width": 16, "group_width": 8}, {"depth": 2, "width": 32, "group_width": 8}]

INVALID = [
    pytest.param("regnety_16g", {}, "model 'regnety_16g' is not known: did you mean regnety_16gf?", id="name"),
    pytest.param("RegNetY-1.6GF", {}, "did you mean regnety_1_6gf?", id="name in the paper"),
    pytest.param("densenet12", {}, "did you mean densenet121?", id="densenet name"),
    pytest.param("regnety_400mf", {"widthrule": "pycls"}, "did you mean width_rule?", id="option"),
    pytest.param("regnety_400mf", {"name": "regnety_800mf"}, "has no option 'name'", id="name as an option"),
    pytest.param("regnety_400mf", {"width_rule": "timm"}, "one of pycls, torchvision", id="choice"),
    pytest.param("regnety_400mf", {"stem": 3}, "must be imagenet or resnet or cifar, not 3", id="type of choice"),
    pytest.param("regnety_400mf", {"depth": "16"}, "depth must be an integer, not '16'", id="type"),
    pytest.param("regnety_400mf", {"zero_gamma": 1}, "zero_gamma must be true or false, not 1", id="type of flag"),
    pytest.param("regnety_400mf", {"wa": float("nan")}, "option wa must be finite, not nan", id="no number"),
    pytest.param("regnety_400mf", {"wm": float("inf")}, "option wm must be finite, not inf", id="infinity"),
    pytest.param("densenet121", {"growth_rate": True}, "must be an integer, not True", id="flag for number"),
    pytest.param(
        "densenet121", {"depths": [6, "x"]}, "option depths, item 2 must be an integer, not 'x'", id="type of item"
    ),
    pytest.param("densenet121", {"depths": 6}, "must be a list, each item an integer", id="list"),
    pytest.param("densenet121", {"depths": []}, "depths=(): expected at least one block", id="no block"),
    pytest.param("densenet121", {"dropout": 1.0}, "dropout=1 is a probability: it must be in [0, 1)", id="probability"),
    pytest.param("densenet121", {"compression": 0}, "compression=0 must be in (0, 1]", id="compression"),
    pytest.param("densenet121", {"bottleneck": -1}, "bottleneck=-1 must be at least 0", id="bottleneck"),
    pytest.param("densenet_bc_23_12", {}, "use 22 or 28", id="depth"),
    pytest.param("densenet_40_0", {}, "growth_rate=0 must be at least 1", id="growth rate"),
    pytest.param("regnet", {"depth": 5}, "missing options: w0, wa, wm, group_width", id="missing options"),
    pytest.param("regnety_400mf", {"w0": 20}, "w0 a positive multiple of 8", id="w0"),
    pytest.param("regnety_400mf", {"group_width": 0}, "group_width=0 must be at least 1", id="no group"),
    pytest.param("regnety_400mf", {"strides": [2, 2]}, "expected 4 values, one per stage", id="strides"),
    pytest.param("regnety_400mf", {"strides": [2, 2, 2, 0]}, "stride=0 of a stage", id="stride"),
    pytest.param("regnety_400mf", {"se_ratio": -1.0}, "se_ratio >= 0, not 1 and -1", id="se ratio"),
    pytest.param("regnety_400mf", {"wa": 1e300}, "wa=1e+300 and bottleneck_ratio=1 are too large", id="wide blocks"),
    pytest.param("regnety_400mf", {"w0": 8 * 10**18}, "no convolution may be wider than 65536", id="wide start"),
    pytest.param("regnety_400mf", {"bottleneck_ratio": 1e-320}, "are too large for depth=16", id="wide bottleneck"),
    pytest.param(
        "anynet",
        {"stages": [{"depth": 1, "width": 10**9}]},
        "width=1000000000 of a stage with bottleneck_ratio=1 is too large",
        id="wide stage",
    ),
    pytest.param("regnety_400mf", {"drop_path": -0.1}, "drop_path=-0.1 is a probability", id="drop path"),
    pytest.param("regnety_400mf", {"stem_width": 0}, "stem_width=0 must be at least 1", id="stem width"),
    pytest.param("anynet", {"stages": []}, "expected at least one", id="no stage"),
    pytest.param("anynet", {"stages": [{"width": 8}]}, "option stages, item 1: missing options: depth"),
    pytest.param("anynet", {"stages": [{"depht": 1}]}, "did you mean depth?", id="option of a stage"),
    pytest.param("anynet", {"stages": [8]}, "option stages, item 1 must be a mapping of depth, width", id="stage"),
    pytest.param("anynet", {"stages": [{**STAGES[0], "group_width": 6}]}, "group_width=6 does not divide 16"),
    pytest.param("anynet", {"stages": [{**STAGES[0], "depth": 0}]}, "depth=0 of a stage", id="empty stage"),
]


@pytest.mark.parametrize(("name", "options", "message"), INVALID)
def test_an_invalid_option_is_rejected_in_one_line_with_the_fix_before_anything_is_built(name, options, message):
    with pytest.raises(UserError) as error:
        network_config(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_classes", [0, -1, 10.5, "10", None])
def test_the_number_of_classes_must_be_a_positive_integer(num_classes):
    with pytest.raises(UserError, match=f"num_classes={num_classes!r} must be an integer of at least 1"):
        build("densenet121", num_classes=num_classes)


@pytest.mark.parametrize(
    ("name", "resolution", "smallest"), [("densenet121", 8, 29), ("densenet_bc_22_12", 3, 4), ("regnety_400mf", 0, 1)]
)
def test_an_image_too_small_for_a_network_is_rejected_with_the_smallest_valid_size(name, resolution, smallest):
    network = build(name, 10).eval()
    with pytest.raises(
        UserError, match=f"image size {resolution} is too small for this network: use at least {smallest} pixels"
    ):
        check_resolution(network, resolution)
    check_resolution(network, smallest)
    assert network(torch.zeros(1, 3, smallest, smallest)).isfinite().all()


def test_options_may_be_yaml_lists_and_mappings_or_dataclasses():
    stages = tuple(StageConfig(**stage) for stage in STAGES)
    assert network_config("anynet", stages=STAGES) == network_config("anynet", stages=stages)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("densenet_40_12", DenseNetConfig((12, 12, 12), 12, 16, "cifar", 0, 1.0)),
        ("densenet_b_40_12", DenseNetConfig((6, 6, 6), 12, 16, "cifar", 4, 1.0)),
        ("densenet_c_40_12", DenseNetConfig((12, 12, 12), 12, 16, "cifar", 0, 0.5)),
        ("densenet_bc_40_12", DenseNetConfig((6, 6, 6), 12, 24, "cifar", 4, 0.5)),
    ],
)
def test_densenet_names_encode_variant_depth_and_growth_rate(name, expected):
    assert network_config(name) == expected


@pytest.mark.parametrize("name", ["densenet_16_8", "densenet_bc_22_8"])
def test_the_papers_dropout_follows_every_convolution_except_the_first(name):
    network = build(name, 10, dropout=0.2)
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.Conv2d) or getattr(m, "p", 0) == 0.2]
    assert kinds[1:] == [nn.Conv2d, nn.Dropout] * (len(kinds) // 2)


def test_torchvisions_dropout_follows_dense_layers_only():
    network = build("densenet_bc_22_8", 10, dropout=0.2, dropout_placement="torchvision")
    assert sum(getattr(module, "p", 0) == 0.2 for module in network.modules()) == 3 * 3


@pytest.mark.parametrize("options", [{"drop_path": 0.5}, {"head_dropout": 0.5}])
def test_randomness_comes_from_torchs_default_generator(options, images):
    network = build("regnet", 5, depth=4, w0=16, wa=8.0, wm=2.0, group_width=8, stem="cifar", **options)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(network(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("densenet_bc_22_8", {"dropout": 0.5}),
        ("anynet", {"stages": STAGES, "drop_path": 0.5, "head_dropout": 0.5}),
    ],
)
def test_nothing_is_dropped_in_evaluation(name, options, images):
    network = build(name, 5, **options).eval()
    assert torch.equal(network(images), network(images))


def test_drop_path_zeroes_whole_images_and_preserves_the_mean():
    dropped = drop_path(torch.ones(10_000, 2, 1, 1), 0.25)
    assert {round(value, 5) for value in dropped.unique().tolist()} == {0.0, round(1 / 0.75, 5)}
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert dropped.mean() == pytest.approx(1, abs=0.02)


def test_later_blocks_are_dropped_more_often():
    assert drop_path_rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(("name", "side"), [("densenet121", "in_channels"), ("regnety_1_6gf", "out_channels")])
def test_convolutions_are_initialized_with_a_variance_of_two_over_fan(name, side):
    """DenseNet by fan-in, RegNet by fan-out, regardless of groups."""
    convolutions = [module for module in build(name).modules() if isinstance(module, nn.Conv2d)]
    fans = [getattr(conv, side) * conv.kernel_size[0] * conv.kernel_size[1] for conv in convolutions]
    scaled = [conv.weight.detach().var() * fan / 2 for conv, fan in zip(convolutions, fans, strict=True)]
    torch.testing.assert_close(torch.stack(scaled), torch.ones(len(scaled)), rtol=0, atol=0.2)


def test_classifiers_are_initialized_as_in_the_authors_code():
    """RegNet: N(0, 0.01^2). DenseNet: uniform within 1 / sqrt(fan_in), torch's default. Zero bias."""
    regnet, densenet = build("regnety_400mf").head, build("densenet121").head
    assert regnet.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert densenet.weight.abs().max().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert not regnet.bias.any()
    assert not densenet.bias.any()


def test_zero_gamma_makes_blocks_start_as_identities():
    network = build("anynet", 5, stages=STAGES, zero_gamma=True)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    at_zero = [name for name, norm in norms.items() if not norm.weight.any()]
    assert at_zero == ["stages.0.0.norm3", "stages.1.0.norm3", "stages.1.1.norm3"]
    maps = torch.rand(2, 32, 4, 4)
    assert torch.equal(network.stages[1][1](maps), maps)


def test_importing_the_models_needs_no_library_except_torch():
    heavy = ["matplotlib", "rich", "timm", "torchvision", "omegaconf", "safetensors", "mlflow"]
    code = f"import sys, distrain.models; print(*set({heavy}) & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "\n"
