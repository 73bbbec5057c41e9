"""Design spaces: what a file may hold, and that every sampled network is as the file says."""

import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.populations import member

from distrain.__main__ import main
from distrain.errors import UserError
from distrain.models import build, network_config
from distrain.models.analytic import network_cost
from distrain.models.regnet import RegNetConfig
from distrain.models.regnet_widths import count_stages
from distrain.sweep.expressions import Expression
from distrain.sweep.ranges import Range
from distrain.sweep.sampling import Sampler
from distrain.sweep.space import load_space
from distrain.sweep.structure import channels

FOLDER = Path(__file__).parents[2] / "configs/sweep"
SPACES = {path.stem: load_space(path) for path in sorted(FOLDER.glob("*.yaml"))}


def lists(sample, name):
    return [value for key, value in sample.parameters.items() if key.partition(".")[0] == name]


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**9), index=st.integers(0, 10**6))
def test_every_sample_is_a_network_that_fulfills_the_conditions(name, seed, index):
    space = SPACES[name]
    sample = Sampler(space).sample(seed, index)
    assert sample == Sampler(space).sample(seed, index)
    config = network_config(sample.network, **sample.options)
    cost = network_cost(config, 1000, 224)
    assert (cost.flops, cost.params, cost.conv_activations) == (sample.flops, sample.params, sample.activations)
    for parameter in space.parameters:
        values = lists(sample, parameter.name)
        assert len(values) == (space.stages if parameter.per_stage else 1)
        for value in values:
            if parameter.range.kind == "choice":
                assert value in parameter.range.choices
            else:
                assert parameter.range.low <= value <= parameter.range.high
                steps = value / parameter.range.step
                assert math.isclose(steps, round(steps), abs_tol=1e-6)
        if parameter.order == "rising":
            assert all(before <= after for before, after in pairwise(values))
    flops, params, activations = sample.flops, sample.params, sample.activations
    if name != "densenet":
        assert 360e6 <= flops <= 400e6
    if name.startswith("regnet"):
        assert len(config.stages()) == 4
    if name.endswith("refined"):
        assert config.bottleneck_ratio == 1
        assert config.depth <= 40
        assert config.wm >= 2
        assert params <= 3e6 + 5.5e-3 * flops
        assert activations <= 6.5e6 * math.sqrt(flops / 1e9)
        assert all(stage.se_ratio == (0.25 if name.startswith("regnety") else 0) for stage in config.stages())


STUDIES = {
    "regnetx_inverted": lambda one: one.inner_width >= 2 * one.width and one.se_ratio == 0,
    "regnetx_depthwise": lambda one: one.group_width == 1,
    "regnetx_depth": lambda one: one.inner_width == one.width,
    "regnety": lambda one: one.se_ratio in (0, 0.25) and one.inner_width == one.width,
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_stages_of_a_study_are_as_its_file_says(name):
    samples = [Sampler(SPACES[name]).sample(0, index) for index in range(8)]
    configs = [network_config(sample.network, **sample.options) for sample in samples]
    assert all(STUDIES[name](stage) for config in configs for stage in config.stages())
    varied = {"regnetx_depth": "depth", "regnety": "se_ratio"}.get(name, "w0")
    assert len({getattr(config, varied) for config in configs}) > 1


@pytest.mark.parametrize(
    ("name", "per_stage"),
    [
        ("anynetx_a", {"depth", "width", "bottleneck_ratio", "group_width"}),
        ("anynetx_b", {"depth", "width", "group_width"}),
        ("anynetx_c", {"depth", "width"}),
        ("anynetx_d", {"depth", "width"}),
        ("anynetx_e", {"depth", "width"}),
    ],
)
def test_each_anynet_shares_one_thing_more_between_its_stages(name, per_stage):
    space = SPACES[name]
    assert {parameter.name for parameter in space.parameters if parameter.per_stage} == per_stage
    rising = {parameter.name for parameter in space.parameters if parameter.order == "rising"}
    assert rising == {"d": {"width"}, "e": {"width", "depth"}}.get(name[-1], set())


@pytest.mark.parametrize(("letter", "log10"), [("a", 18), ("b", 16), ("c", 14), ("d", 13), ("e", 11)])
def test_the_spaces_are_as_large_as_in_the_paper(letter, log10):
    """Table 1 and section 3.2 give the powers of ten, cut off."""
    assert int(math.log10(SPACES[f"anynetx_{letter}"].count())) == log10


def test_samples_of_one_space_seed_and_index_never_change():
    sample = Sampler(SPACES["regnetx_refined"]).sample(1, 7)
    assert dict(sample.parameters) == {"depth": 28, "w0": 24, "wa": 11.3, "wm": 2.388, "group_width": 16}
    assert sample.flops == 380604904


LINES = st.tuples(
    st.integers(1, 63), st.integers(1, 32).map(lambda n: 8 * n), st.integers(0, 2560), st.integers(1001, 4000)
)


@example([(12, 24, 120, 2250), (9, 16, 160, 4000), (1, 8, 80, 1500)])  # logarithms that end in one half
@given(st.lists(LINES, min_size=1, max_size=70))
@settings(deadline=None)
def test_stages_counted_in_a_batch_are_those_of_each_network(rows):
    lines = [(depth, w0, tenths / 10, thousandths / 1000) for depth, w0, tenths, thousandths in rows]
    counted = count_stages(*(np.array(column) for column in zip(*lines, strict=True)))
    networks = [RegNetConfig(depth=depth, w0=w0, wa=wa, wm=wm, group_width=1) for depth, w0, wa, wm in lines]
    assert counted.tolist() == [len(network.stages()) for network in networks]


@pytest.mark.parametrize("name", [name for name in SPACES if name.startswith("regnet")])
def test_draws_that_are_rejected_by_their_stages_would_be_rejected_anyway(name, monkeypatch):
    space = load_space(FOLDER / f"{name}.yaml", flops=(0, 1e12))
    fast = [Sampler(space).accepted(seed, 400) for seed in range(4)]
    assert sum(fast) > 20
    monkeypatch.setattr(Sampler, "_wrong_stages", lambda _, batch: [""] * len(batch))
    assert [Sampler(space).accepted(seed, 400) for seed in range(4)] == fast


def test_a_draw_after_the_accepted_one_is_not_looked_at(tmp_path):
    """Draws are made in batches: a derived option without a value matters only where a network has it."""
    (tmp_path / "space.yaml").write_text(
        "network: regnet\nsample: {depth: {uniform: [1, 64]}}\nderive: {wa: 8 + 0 / (depth - 9)}\n"
        "fixed: {w0: 16, wm: 2.0, group_width: 8}\nkeep: [stages >= 1]\n"
    )
    sampler = Sampler(load_space(tmp_path / "space.yaml"))
    assert sampler.sample(0, 0).parameters["wa"] == 8


def test_sampled_networks_can_be_built():
    for space in SPACES.values():
        sample = Sampler(space, 10, 32 if space.name == "densenet" else 224).sample(0, 0)
        assert sum(p.numel() for p in build(sample.network, 10, **sample.options).parameters()) == sample.params


def test_values_follow_their_distribution():
    uniforms = [(number + 0.5) / 4096 for number in range(4096)]
    even = Range.parse({"uniform": [1, 4]}, "x")
    assert [[even.draw(u) for u in uniforms].count(value) for value in (1, 2, 3, 4)] == [1024] * 4
    log = Range.parse({"log": [1, 16]}, "x")
    drawn = [log.draw(u) for u in uniforms]
    octaves = [sum(low <= value < 2 * low for value in drawn) for low in (2, 4, 8)]
    assert max(octaves) / min(octaves) < 1.2
    assert (min(drawn), max(drawn)) == (1, 16)
    real = Range.parse({"log": [0.01, 1.0]}, "x")
    assert real.count == math.inf
    assert math.isclose(real.draw(0.5), 0.1)
    assert Range.parse({"uniform": [0.0, 0.3], "step": 0.1}, "x").draw(0.99) == 0.3


WORDS = (
    "network: anynet\nstages: 2\nsample:\n  width: {log: [8, 64], step: 8, per: stage}\n  depth: {uniform: [1, 4]}\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network: vit\n", "network must be set to one of regnet, anynet, densenet"),
        ("stages: 2\n", "network must be set to one of"),
        ("network: anynet\nsample: {depth: {uniform: [1, 2]}}\n", "stages must be set, such as stages: 4"),
        ("network: regnet\nstages: 3\nsample: {depth: {uniform: [1, 2]}}\n", "stages: leave it out: those of a RegNet"),
        ("network: regnet\n", "sample: nothing is drawn: name an option"),
        ("network: regnet\nsample: {dept: {uniform: [1, 2]}}\n", "regnet has no option dept: did you mean depth?"),
        ("network: regnet\nsample: {depth: [1, 2]}\n", "sample: depth: write {uniform: [LOW, HIGH]}"),
        ("network: regnet\nsample: {depth: {uniform: [2, 1]}}\n", "uniform needs LOW < HIGH"),
        ("network: regnet\nsample: {depth: {log: [0, 1]}}\n", "log needs LOW < HIGH, both above 0"),
        ("network: regnet\nsample: {w0: {log: [9, 15], step: 8}}\n", "no multiple of 8 lies between 9 and 15"),
        ("network: regnet\nsample: {depth: {choice: []}}\n", "choice needs a list of numbers or words"),
        ("network: regnet\nsample: {depth: {uniform: [1, 2], per: stage}}\n", "per: stage is for AnyNets"),
        (WORDS + "fixed: {depth: 3}\n", "depth is set twice, in two of sample, derive and fixed"),
        (WORDS + "keep: [flop <= 1]\n", "'flop <= 1': no flop here: did you mean flops?"),
        (WORDS + "keep: ['flops <=']\n", "'flops <=' is not an expression"),
        (WORDS + "keep: ['__import__(\"os\")']\n", "only arithmetic, comparisons"),
        (WORDS + "keep: [depth.real > 1]\n", "only arithmetic, comparisons"),
        (WORDS + "keep: [width > 1]\n", "'width > 1' has no value: '>' not supported"),
        (WORDS + "keep: [flops < 10]\n", "100.0% of them fail at: flops < 10; widen"),
        (
            "network: densenet\nstages: 1\nsample: {depth: {uniform: [2, 4]}}\nfixed: {growth_rate: 4, stem: cifar}\n",
            "fail at: the network cannot be built (model densenet: missing options: stem_width); widen",
        ),
        ("extends: nothing.yaml\n", "extends nothing.yaml, which is not there"),
        (WORDS + "flops: [300, 400XF]\n", "flops: 400XF: write multiply-adds as 400MF, 1.6GF or 4e8"),
        (WORDS + "flops: [400MF, 0.3GF]\n", "flops needs two numbers, [FEWEST, MOST], not ['400MF', '0.3GF']"),
        ("network: anynet\nnetwork: regnet\n", "line 2"),
    ],
)
def test_a_space_that_makes_no_sense_is_one_line(tmp_path, text, message, monkeypatch):
    monkeypatch.setattr("distrain.sweep.sampling._MAX_DRAWS", 640)
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        Sampler(load_space(tmp_path / "space.yaml")).sample(0, 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_replaces_what_it_extends_and_adds_conditions(tmp_path):
    (tmp_path / "base.yaml").write_text(WORDS + "keep: [flops < 1e9]\nfixed: {stem: cifar}\n")
    (tmp_path / "mine.yaml").write_text(
        "extends: base.yaml\nsample: {width: {choice: [16, 24]}}\nkeep: [stages == 2]\n"
    )
    space = load_space(tmp_path / "mine.yaml", fixed={"head_width": 64}, keep=["depth > 1"])
    assert [(parameter.name, parameter.per_stage) for parameter in space.parameters] == [
        ("width", False),
        ("depth", False),
    ]
    assert [condition.text for condition in space.conditions] == ["flops < 1e9", "stages == 2", "depth > 1"]
    assert space.fixed == {"stem": "cifar", "head_width": 64}


def test_multiply_adds_may_have_a_unit(tmp_path):
    for window in ("[360MF, 0.4GF]", "[360e6, 400000000]", "[360 mf, 4e8]"):
        (tmp_path / "space.yaml").write_text(WORDS + f"flops: {window}\n")
        assert load_space(tmp_path / "space.yaml").conditions[0].text == "3.6e+08 <= flops <= 4e+08"


def test_expressions_compute():
    values = {"width": [8, 16, 40], "depth": 3}
    for text, value in {
        "1 + 2 * depth ** 2 / 4 - 7 // 2 % 2": 1 + 2 * 9 / 4 - 1,
        "width[0] < width[1] < width[-1] and not depth == 4": True,
        "depth > 5 or max(width) >= 40": True,
        "sum(width) / len(width) + sqrt(16) + abs(-depth)": 64 / 3 + 7,
    }.items():
        assert Expression(text, values, "x").evaluate(values) == value
    with pytest.raises(UserError, match=r"x: '1 / \(depth - 3\)' has no value: division by zero"):
        Expression("1 / (depth - 3)", values, "x").evaluate(values)


def test_the_tools_of_readme_print_networks_and_sizes(capsys, monkeypatch):
    lines = [line.strip() for line in (FOLDER.parents[1] / "README.md").read_text().splitlines()]
    tools = tuple(f"python -m distrain sweep {name}" for name in ("sample", "size", "fit"))
    commands = [line for line in lines if line.startswith(tools)]
    assert len(commands) == 3
    monkeypatch.chdir(FOLDER.parents[1])
    for command in commands:
        monkeypatch.setattr("sys.argv", ["distrain", *command.split()[3:]])
        assert main() == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["i", "depth", "w0", "wa", "wm", "group_width", "flops", "params", "acts"]
    assert [line.split()[0] for line in printed[1:21]] == [str(number) for number in range(20)]
    assert printed[21].startswith("anynetx_a: 10^18.3 ways to draw, of which ")
    assert printed[22].startswith("regnetx: 10^11.1 ways to draw, of which ")
    assert printed[23].split()[-5:] == ["flops", "params", "acts", "widths", "depths"]
    assert all(line.startswith("model.name=regnet 'model.options={") for line in printed[29:])
    assert len(printed) == 34


@pytest.mark.parametrize("name", ["anynetx_e", "densenet"])
def test_sampled_networks_are_drawn(monkeypatch, capsys, tmp_path, name):
    words = ["sweep", "sample", str(FOLDER / f"{name}.yaml"), "--n", "6", "--draw", str(tmp_path / "drawn.svg")]
    monkeypatch.setattr("sys.argv", ["distrain", *words])
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path}/drawn.svg"
    drawn = ElementTree.parse(tmp_path / "drawn.svg").iter()
    assert sum(one.get("id", "").startswith("axes_") for one in drawn) >= 6
    monkeypatch.setattr("sys.argv", ["distrain", *words[:-1], str(tmp_path / "drawn.doc")])
    assert main() == 78
    assert f"--draw {tmp_path}/drawn.doc: cannot be written: Format 'doc' is not supported" in capsys.readouterr().err


def test_the_channels_of_a_densenet_grow_by_layers_and_shrink_between_blocks():
    options = {"growth_rate": 4, "depths": [2, 3], "stem_width": 8, "stem": "cifar", "compression": 0.5}
    assert channels(member(0, network="densenet", options=options)).tolist() == [12, 16, 12, 16, 20]
