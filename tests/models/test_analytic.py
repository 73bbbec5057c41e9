import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.errors import UserError
from distrain.models import AnyNetConfig, DenseNetConfig, StageConfig, build, network_config
from distrain.models.analytic import ImageTooSmallError, network_cost
from distrain.models.complexity import count_complexity, total

STAGES = st.builds(
    lambda depth, groups, group_width, ratio, se_ratio, stride: StageConfig(
        depth, int(groups * group_width * ratio), ratio, group_width, se_ratio, stride
    ),
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 8]), st.sampled_from([0.5, 1, 2]),
    st.sampled_from([0, 0.25]), st.sampled_from([1, 2]),
)  # fmt: skip
ANYNETS = st.builds(
    AnyNetConfig,
    stages=st.lists(STAGES, min_size=1, max_size=3).map(tuple),
    stem=st.sampled_from(["imagenet", "resnet", "cifar"]),
    stem_width=st.integers(1, 9),
    head_width=st.sampled_from([0, 12]),
)
DENSENETS = st.builds(
    DenseNetConfig,
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    growth_rate=st.integers(1, 7),
    stem_width=st.integers(1, 9),
    stem=st.sampled_from(["imagenet", "cifar"]),
    bottleneck=st.sampled_from([0, 2, 4]),
    compression=st.sampled_from([0.1, 0.5, 1.0]),
)


def counted(name, config, resolution):
    options = {entry: getattr(config, entry) for entry in config.__dataclass_fields__}
    with torch.device("meta"):
        return total(count_complexity(build(name, 10, **options), resolution).values())


@pytest.mark.parametrize(("name", "configs"), [("anynet", ANYNETS), ("densenet", DENSENETS)])
def test_the_cost_is_that_of_the_layers(name, configs):
    @settings(max_examples=40, deadline=None)
    @given(configs, st.integers(1, 70))
    def check(config, resolution):
        try:
            expected = counted(name, config, resolution)
        except UserError:
            with pytest.raises(ImageTooSmallError):
                network_cost(config, 10, resolution)
        else:
            assert network_cost(config, 10, resolution) == expected

    check()


@pytest.mark.parametrize("name", ["regnety_16gf", "regnetx_400mf", "densenet121", "densenet_100_12"])
def test_published_networks_cost_what_their_layers_do(name):
    with torch.device("meta"):
        network = build(name)
    assert network_cost(network_config(name), 1000, 224) == total(count_complexity(network, 224).values())
