"""Every published network has exactly the published complexity."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models import get_model_weights

from distrain.models import PUBLISHED, build, network_config
from distrain.models.complexity import Cost, count_complexity, total

REGNETS = [
    f"regnet{letter}_{size}"
    for letter in "xy"
    for size in (
        *("200mf", "400mf", "600mf", "800mf", "1_6gf", "3_2gf"),
        *("4gf", "6_4gf", "8gf", "12gf", "16gf", "32gf"),
    )
]
DENSENETS = [
    *("densenet121", "densenet161", "densenet169", "densenet201", "densenet264", "densenet_cosine_264"),
    *("densenet_40_12", "densenet_100_12", "densenet_100_24"),
    *("densenet_bc_100_12", "densenet_bc_250_24", "densenet_bc_190_40"),
]
CIFAR100_PARAMS = {
    "densenet_40_12": 1_060_132,
    "densenet_100_12": 7_084_852,
    "densenet_100_24": 27_457_972,
    "densenet_bc_100_12": 800_032,
    "densenet_bc_250_24": 15_480_556,
    "densenet_bc_190_40": 25_821_620,
}
# flops, params and activations: from the RegNet authors' model zoo; for DenseNets, derived from the paper.
COSTS = {
    "regnetx_200mf": (199_040_872, 2_684_792, 2_164_056),
    "regnetx_400mf": (397_678_568, 5_157_512, 3_143_272),
    "regnetx_600mf": (600_891_112, 6_196_040, 3_975_096),
    "regnetx_800mf": (799_700_712, 7_259_656, 5_148_744),
    "regnetx_1_6gf": (1_602_850_792, 9_190_136, 7_933_512),
    "regnetx_3_2gf": (3_176_622_952, 15_296_552, 11_367_432),
    "regnetx_4gf": (3_964_499_816, 22_118_248, 12_201_608),
    "regnetx_6_4gf": (6_460_292_264, 26_209_256, 16_369_744),
    "regnetx_8gf": (7_995_133_416, 39_572_648, 14_059_688),
    "regnetx_12gf": (12_086_679_016, 46_106_056, 21_366_568),
    "regnetx_16gf": (15_940_756_456, 54_278_536, 25_515_496),
    "regnetx_32gf": (31_735_930_792, 107_811_560, 36_302_160),
    "regnety_200mf": (199_519_076, 3_162_996, 2_168_052),
    "regnety_400mf": (401_849_056, 4_344_144, 3_892_496),
    "regnety_600mf": (601_227_608, 6_055_160, 4_334_296),
    "regnety_800mf": (797_183_328, 6_263_168, 5_249_888),
    "regnety_1_6gf": (1_612_087_326, 11_202_430, 8_044_814),
    "regnety_3_2gf": (3_176_496_162, 19_436_338, 11_263_418),
    "regnety_4gf": (3_973_301_344, 20_646_656, 12_287_200),
    "regnety_6_4gf": (6_355_221_876, 30_583_252, 16_407_188),
    "regnety_8gf": (7_963_074_196, 39_180_068, 17_968_916),
    "regnety_12gf": (12_092_395_504, 51_822_544, 21_384_496),
    "regnety_16gf": (15_911_534_044, 83_590_140, 23_041_228),
    "regnety_32gf": (32_279_583_362, 145_046_770, 30_261_570),
    "densenet121": (2_834_162_664, 7_978_856, 7_100_904),
    "densenet161": (7_727_908_072, 28_681_000, 11_365_864),
    "densenet169": (3_359_844_328, 14_149_480, 7_502_312),
    "densenet201": (4_291_366_888, 20_013_928, 8_054_248),
    "densenet264": (5_751_654_376, 33_337_704, 8_731_624),
    "densenet_cosine_264": (12_850_694_632, 72_686_632, 13_096_936),
    "densenet_40_12": (264_812_938, 1_019_722, 451_594),
    "densenet_100_12": (1_769_516_458, 6_979_642, 1_142_794),
    "densenet_100_24": (6_889_347_754, 27_249_082, 2_248_714),
    "densenet_bc_100_12": (287_929_702, 769_162, 1_463_818),
    "densenet_bc_250_24": (5_418_785_734, 15_324_406, 7_382_026),
    "densenet_bc_190_40": (9_301_945_750, 25_624_430, 9_333_770),
}
# Activations as the papers count them, convolution outputs only, derived from the papers.
CONV_ACTIVATIONS = {
    "regnety_400mf": 3_891_496,
    "regnety_16gf": 23_040_228,
    "densenet121": 6_899_200,
    "densenet161": 11_063_808,
    "densenet169": 7_300_608,
    "densenet201": 7_852_544,
    "densenet264": 8_529_920,
    "densenet_cosine_264": 12_794_880,
    "densenet_40_12": 451_584,
    "densenet_100_12": 1_142_784,
    "densenet_100_24": 2_248_704,
    "densenet_bc_100_12": 1_463_808,
    "densenet_bc_250_24": 7_382_016,
    "densenet_bc_190_40": 9_333_760,
}
TORCHVISION = {name: entry for name, entry in PUBLISHED.items() if entry.torchvision}


def build_on_meta(name: str, num_classes: int, **options: object) -> nn.Module:
    with torch.device("meta"):
        return build(name, num_classes, **options)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def count_by_running(network: nn.Module, resolution: int) -> dict[str, tuple[Cost, int, int]]:
    """Return the cost, output width and output area of each layer by name, in execution order, from forward hooks
    in a run on the meta device."""
    counted = {}
    names = {module: name for name, module in network.named_modules()}

    def record(module: nn.Module, output: torch.Tensor, cost: Cost) -> None:
        counted[names[module]] = cost + Cost(params=count_parameters(module)), output.shape[1], output[0, 0].numel()

    def count_conv(conv: nn.Conv2d, _: object, output: torch.Tensor) -> None:
        inputs = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        flops = output.numel() * inputs + (0 if conv.bias is None else output.numel())
        record(conv, output, Cost(flops, 0, output.numel(), output.numel()))

    def count_linear(linear: nn.Linear, _: object, output: torch.Tensor) -> None:
        record(linear, output, Cost(output.numel() * (linear.in_features + 1), 0, output.numel()))

    def count_pool(pool: nn.Module, _: object, output: torch.Tensor) -> None:
        record(pool, output, Cost(activations=output.numel()))

    def count_norm(norm: nn.Module, _: object, output: torch.Tensor) -> None:
        record(norm, output, Cost())

    hooks: dict[type, Callable[..., None]] = {
        nn.Conv2d: count_conv, nn.Linear: count_linear, nn.MaxPool2d: count_pool, nn.BatchNorm2d: count_norm,
    }  # fmt: skip
    for module in network.modules():
        module.register_forward_hook(hooks.get(type(module), lambda *_: None))
    network.eval()(torch.empty(1, 3, resolution, resolution, device="meta"))
    return counted


def test_all_published_networks_are_in_the_table():
    assert set(PUBLISHED) == {*REGNETS, "regnety_128gf", *DENSENETS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_network_has_the_published_flops_params_and_activations(name):
    published = PUBLISHED[name]
    network = build_on_meta(name, published.num_classes)
    assert total(count_complexity(network, published.resolution).values()) == published.cost
    assert count_parameters(network) == published.cost.params


def test_reference_costs_cover_every_network_of_the_papers():
    assert list(COSTS) == [*REGNETS, *DENSENETS]


@pytest.mark.parametrize(("name", "cost"), COSTS.items())
def test_the_table_has_the_published_numbers(name, cost):
    table = PUBLISHED[name].cost
    assert (table.flops, table.params, table.activations) == cost


@pytest.mark.parametrize(("name", "activations"), CONV_ACTIVATIONS.items())
def test_the_table_has_activations_of_convolutions_only(name, activations):
    assert PUBLISHED[name].cost.conv_activations == activations


@pytest.mark.parametrize(("name", "params"), CIFAR100_PARAMS.items())
def test_densenets_for_cifar100_have_the_published_params(name, params):
    assert count_parameters(build_on_meta(name, 100)) == params


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_have_torchvisions_cost_and_accuracy(name):
    weights = get_model_weights(name.replace("regnetx", "regnet_x").replace("regnety", "regnet_y"))
    options = {"width_rule": "torchvision"} if TORCHVISION[name].torchvision_rule else {}
    cost = total(count_complexity(build_on_meta(name, 1000, **options), 224).values())
    expected = weights["IMAGENET1K_V1"].meta
    assert cost.params == expected["num_params"]
    assert cost.flops / 1e9 == pytest.approx(expected["_ops"], abs=5e-4)
    assert TORCHVISION[name].torchvision == {
        version: weights[f"IMAGENET1K_{version}"].meta["_metrics"]["ImageNet-1K"]["acc@1"]
        for version in TORCHVISION[name].torchvision
    }


OPTIONS = [
    ("densenet121", {}),
    ("densenet_bc_22_12", {}),
    ("regnetx_400mf", {"width_rule": "torchvision"}),
    ("regnety_800mf", {"head_width": 96, "stem": "resnet"}),
    ("anynet", {"stages": [{"depth": 2, "width": 24, "bottleneck_ratio": 0.5}]}),
]


@pytest.mark.parametrize(
    ("name", "options", "resolution"),
    [*((name, {}, 97) for name in PUBLISHED), *((*network, size) for network in OPTIONS for size in (64, 97, 288))],
)
def test_counting_agrees_with_a_run_on_the_meta_device(name, options, resolution):
    network = build_on_meta(name, 10, **options)
    counted = count_complexity(network, resolution).items()
    expected = count_by_running(network, resolution)
    assert {name: (layer.cost, layer.width, layer.size**2) for name, layer in counted} == expected


def test_every_parameter_belongs_to_exactly_one_counted_layer():
    network = build_on_meta("regnety_400mf", 1000)
    counted = count_complexity(network, 224)
    owners = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    assert set(counted) == owners


def test_five_networks_differ_between_the_width_rules():
    differing = [
        name
        for name in REGNETS
        if network_config(name).stages() != network_config(name, width_rule="torchvision").stages()
    ]
    assert differing == ["regnetx_400mf", "regnetx_4gf", "regnety_800mf", "regnety_4gf", "regnety_8gf"]
