"""RegNets for a budget."""

import json
import math
import shlex
from pathlib import Path

import pytest
from support.populations import member

from distrain.__main__ import main
from distrain.errors import UserError
from distrain.files import write_json
from distrain.models import PUBLISHED, RegNetConfig, network_config
from distrain.models.analytic import network_cost
from distrain.sweep.fit import Shape, best_shape, fit, published_shape, regnet_config
from distrain.sweep.halving import Halving
from distrain.sweep.space import load_space
from distrain.sweep.sweep import Sweep

ROOT = Path(__file__).parents[2]
REFINED = ROOT / "configs/sweep/regnetx_refined.yaml"
BUDGETS = {name: one.cost.flops for name, one in PUBLISHED.items() if name.startswith("regnetx_")}


def near(flops, tolerance=0.025, path=REFINED, **options):
    return load_space(path, flops=((1 - tolerance) * flops, (1 + tolerance) * flops), **options)


@pytest.mark.parametrize("name", BUDGETS)
def test_every_published_budget_has_networks_of_the_space(name):
    target = BUDGETS[name]
    space = near(target)
    found = fit(space, published_shape(target), target, 3)
    assert [one.index for one in found] == [0, 1, 2]
    for one in found:
        config = network_config("regnet", **one.options)
        cost = network_cost(config, 1000, 224)
        assert (cost.flops, cost.params, cost.conv_activations) == (one.flops, one.params, one.activations)
        assert abs(one.flops / target - 1) <= 0.025
        assert len(config.stages()) == 4
        assert one.params <= 3e6 + 5.5e-3 * one.flops
        assert one.activations <= 6.5e6 * math.sqrt(one.flops / 1e9)
        for parameter in space.parameters:
            assert one.parameters[parameter.name] == parameter.range.nearest(one.parameters[parameter.name])
    assert len({regnet_config(one).stages() for one in found}) == 3
    assert found == fit(space, published_shape(target), target, 3)


def test_the_shape_of_a_published_network_gives_that_network_at_its_budget():
    published = RegNetConfig(**PUBLISHED["regnetx_400mf"].config)
    (found,) = fit(near(BUDGETS["regnetx_400mf"]), Shape.of(published), BUDGETS["regnetx_400mf"], 1)
    assert regnet_config(found).stages() == published.stages()


def test_the_published_trend_is_a_steeper_slope_for_smaller_networks():
    small, large = published_shape(200e6), published_shape(32e9)
    for one in (small, large):
        assert 15 < one.depth < 24
        assert 2.1 < one.wm < 2.6
        assert one.bottleneck_ratio == 1
    assert small.slope > 3 * large.slope
    assert published_shape(1e6) == published_shape(min(BUDGETS.values()))


def population(count=40):
    """The best quarter shares depth 14, wm 2.6, slope 1 and g = w0 / 2; the others are 24 deep with wm 2.1."""
    for index in range(count):
        good = index < count // 4
        w0 = 16 + 8 * (index % 3)
        options = {
            "depth": 14 if good else 24,
            "w0": w0,
            "wa": w0 * (1.0 if good else 0.5),
            "wm": 2.6 if good else 2.1,
            "group_width": w0 // 2 if good else 8,
        }
        yield member(index, 0.1 + 0.01 * index, options=options)


def test_the_best_quarter_of_a_sweep_gives_the_shape():
    members = [*population(), member(40, 0.0, status="failed"), member(41)]
    like = best_shape(members)
    assert like == Shape(14, 2.6, 1.0, 0.5)
    for flops in (200e6, 800e6):
        (found,) = fit(near(flops), like, flops, 1)
        config = regnet_config(found)
        assert (config.depth, config.wm) == (pytest.approx(14, abs=2), pytest.approx(2.6, abs=0.25))
        assert config.wa / config.w0 == pytest.approx(1.0, rel=0.3)
        assert config.group_width / config.w0 == pytest.approx(0.5, rel=0.42)  # of powers of two


def test_a_sweep_without_results_is_one_line():
    with pytest.raises(UserError, match="no RegNet is done in this sweep"):
        best_shape([member(0), member(1, 0.1, network="densenet", options={})])


@pytest.mark.parametrize(
    ("flops", "keep", "message"),
    [
        (400e9, (), "no network for 400000MF: those that fulfill the most conditions fail at: 3.9e+11 <= flops"),
        (1000, (), "fail at: 975 <= flops <= 1025; choose another --flops"),
        (400e6, ("depth > 99",), "fail at: depth > 99; choose another"),
    ],
)
def test_a_budget_without_networks_is_one_line(flops, keep, message):
    with pytest.raises(UserError) as caught:
        fit(near(flops, keep=keep), published_shape(flops), flops, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_spaces_of_regnets_are_searched():
    with pytest.raises(UserError, match="densenet: fit scales w0 of RegNets, which this space does not draw"):
        fit(near(1e9, path=REFINED.with_name("densenet.yaml")), published_shape(1e9), 1e9, 1)


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["distrain", "sweep", "fit", str(REFINED), *words])
    return main()


def test_the_command_prints_settings_of_runs(monkeypatch, capsys, tmp_path):
    sweep = tmp_path / "sweep"
    Sweep.create(sweep, list(population(8)), {}, Halving())
    for index in range(8):
        (sweep / f"claims/regnetx-{index:06d}").mkdir(parents=True)
        result = {"errors": [index / 10], "seconds": 1, "reason": ""}
        write_json(sweep / f"claims/regnetx-{index:06d}/result.json", result)
    small = ("--flops", "5MF", "--set", "stem=cifar", "--image-size", "32", "--classes", "10", "--tolerance", "0.1")
    assert run(monkeypatch, *small, "--n", "2", "--like", str(sweep)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert " ".join(printed[0].split()) == "i depth w0 wa wm group_width flops params acts widths depths"
    for row, line in zip(printed[1:3], printed[3:], strict=True):
        name, options = shlex.split(line)
        assert name == "model.name=regnet"
        config = network_config("regnet", **json.loads(options.partition("=")[2]))
        assert config.stem == "cifar"
        assert abs(network_cost(config, 10, 32).flops / 5e6 - 1) <= 0.1
        assert row.split()[-1] == ",".join(str(stage.depth) for stage in config.stages())
        assert abs(config.depth - 14) <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--flops", "400XF"), "--flops 400XF: write multiply-adds as 400MF, 1.6GF or 4e8"),
        (("--flops", "0"), "--flops 0: must be above 0 and finite"),
        (("--flops", "400MF", "--like", "nowhere"), "nowhere: no sweep: give the folder that `sweep run --out` made"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, words, message):
    assert run(monkeypatch, *words) == 78
    assert capsys.readouterr().err.strip() == f"distrain: {message}"
