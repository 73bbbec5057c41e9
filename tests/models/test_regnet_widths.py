"""A RegNet's stages follow from its parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.regnet import BlockParams

from distrain.models import PUBLISHED, AnyNet, build, network_config
from distrain.models.regnet import RegNetConfig
from distrain.models.regnet_widths import adjust_width, line_widths, quantize_widths

RULES = ["pycls", "torchvision"]

# Depths, widths and group widths in the authors' model zoo.
STAGES = {
    "regnetx_200mf": ([1, 1, 4, 7], [24, 56, 152, 368], [8, 8, 8, 8]),
    "regnetx_400mf": ([1, 2, 7, 12], [32, 64, 160, 384], [16, 16, 16, 16]),
    "regnetx_4gf": ([2, 5, 14, 2], [80, 240, 560, 1360], [40, 40, 40, 40]),
    "regnetx_8gf": ([2, 5, 15, 1], [80, 240, 720, 1920], [80, 120, 120, 120]),
    "regnetx_32gf": ([2, 7, 13, 1], [336, 672, 1344, 2520], [168, 168, 168, 168]),
    "regnety_800mf": ([1, 3, 8, 2], [64, 128, 320, 768], [16, 16, 16, 16]),
    "regnety_8gf": ([2, 4, 10, 1], [168, 448, 896, 2016], [56, 56, 56, 56]),
    "regnety_16gf": ([2, 4, 11, 1], [224, 448, 1232, 3024], [112, 112, 112, 112]),
}

regnets = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 40),
        "w0": st.integers(1, 32).map(lambda eighths: 8 * eighths),
        "wa": st.floats(0, 256),
        "wm": st.floats(1.5, 3),
    }
)


@pytest.mark.parametrize("name", STAGES)
def test_published_parameters_give_the_published_stages(name):
    stages = network_config(name).stages()
    columns = zip(*((stage.depth, stage.width, stage.group_width) for stage in stages), strict=True)
    assert tuple(list(values) for values in columns) == STAGES[name]


@pytest.mark.parametrize("name", [name for name, entry in PUBLISHED.items() if entry.family == "regnet"])
def test_the_torchvision_rule_gives_torchvisions_stages(name):
    """For all networks, including those that torchvision does not provide."""
    numbers = PUBLISHED[name].config
    expected = BlockParams.from_init_params(
        numbers["depth"], numbers["w0"], numbers["wa"], numbers["wm"], numbers["group_width"]
    )
    stages = network_config(name, width_rule="torchvision").stages()
    assert [stage.width for stage in stages] == expected.widths
    assert [stage.depth for stage in stages] == expected.depths
    assert [stage.group_width for stage in stages] == expected.group_widths


@given(regnets)
def test_widths_are_multiples_of_eight_and_never_decrease(numbers):
    widths = quantize_widths(**numbers)
    assert len(widths) == numbers["depth"]
    assert widths[0] == numbers["w0"]
    assert (widths % 8 == 0).all()
    assert (widths[1:] >= widths[:-1]).all()


@given(regnets)
def test_quantized_widths_stay_within_half_a_step_of_the_line(numbers):
    line = line_widths(numbers["depth"], numbers["w0"], numbers["wa"])
    widths = quantize_widths(**numbers)
    largest = numbers["wm"] ** 0.5 * (1 + 1e-9)
    assert (widths <= line * largest + 4).all()
    assert (widths >= line / largest - 4).all()


@pytest.mark.parametrize("rule", RULES)
@given(
    width=st.integers(1, 256).map(lambda eighths: 8 * eighths),
    ratio=st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]),
    group=st.sampled_from([1, 2, 8, 24, 40, 64, 120, 264]),
)
def test_groups_divide_the_adjusted_width(rule, width, ratio, group):
    adjusted, smaller = adjust_width(width, ratio, group, rule)
    assert 1 <= smaller <= group
    assert adjusted / ratio % smaller == 0


@pytest.mark.parametrize(
    ("width", "group", "pycls", "torchvision"),
    [
        pytest.param(72, 16, 64, 80, id="tie: to even, up"),
        pytest.param(104, 16, 96, 112, id="tie: to even, up (2)"),
        pytest.param(50, 40, 40, 80, id="nearest is below 90%: kept, up"),
        pytest.param(46, 16, 48, 48, id="nearest"),
    ],
)
def test_the_two_rules_round_as_their_libraries_do(width, group, pycls, torchvision):
    assert adjust_width(width, 1.0, group, "pycls") == (pycls, group)
    assert adjust_width(width, 1.0, group, "torchvision") == (torchvision, group)


@pytest.mark.parametrize(("width", "ratio", "group", "expected"), [(8, 0.25, 6, 9), (40, 0.5, 5, 40), (24, 0.5, 9, 27)])
def test_the_pycls_rule_keeps_the_outer_width_of_inverted_bottlenecks_an_integer(width, ratio, group, expected):
    assert adjust_width(width, ratio, group, "pycls") == (expected, group)
    assert expected / ratio % group == 0


@given(regnets, st.sampled_from([8, 16, 24, 64]), st.sampled_from(RULES))
def test_every_sampled_regnet_is_a_valid_anynet(numbers, group, rule):
    config = RegNetConfig(**numbers, group_width=group, width_rule=rule)
    assert sum(stage.depth for stage in config.anynet().stages) == numbers["depth"]


@pytest.mark.parametrize(("ratio", "group"), [(0.5, 8), (0.25, 1), (1.0, 1), (4.0, 8)])
def test_inverted_bottlenecks_and_depthwise_convolutions_are_allowed(ratio, group, images):
    stage = {"depth": 1, "width": 32, "bottleneck_ratio": ratio, "group_width": group}
    network = build("anynet", 5, stages=[stage])
    assert isinstance(network, AnyNet)
    assert network.stages[0][0].conv2.out_channels == 32 / ratio
    assert network.stages[0][0].conv2.groups == 32 / ratio / group
    assert network(images).shape == (4, 5)
