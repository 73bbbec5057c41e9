"""`python -m distrain models` lists, shows and plots networks."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from distrain import cli
from distrain.errors import UserError
from distrain.models import PUBLISHED, RegNetConfig, network_config
from distrain.models.cli import _EXAMPLES, add_arguments
from distrain.models.plot import draw_widths

STAGE = "{depth: 1, width: 16, bottleneck_ratio: 0.5, group_width: 8, se_ratio: 0.25, stride: 1}"


@pytest.fixture
def models(capsys):
    """Run the tool and return the lines it prints."""

    def run(*arguments: str) -> list[str]:
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(arguments)
        assert args.run(args) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_the_list_has_a_row_for_every_published_network(models, arguments):
    lines = models(*arguments)
    listed = [line for line in lines if line.split(" ")[0] in PUBLISHED]
    assert [line.split()[0] for line in listed] == list(PUBLISHED)
    assert all(f"{PUBLISHED[line.split()[0]].top1:.2f}" in line for line in listed)


def test_a_row_of_the_list_shows_cost_and_accuracies(models):
    line = next(line for line in models() if line.startswith("regnety_16gf "))
    assert line.split() == [
        *("regnety_16gf", "15.91", "G", "83.59", "M", "23.04", "M"),
        *("80.39", "pycls", "80.42", "82.89"),
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("show", "regnety_32gf"),
        ("show", "densenet264", "--layers"),
        ("show", "densenet_bc_100_12"),
        ("show", "regnety_128gf", "--layers", "--resolution", "384"),
        ("show", "anynet", f"stages=[{', '.join([STAGE] * 40)}]", "--resolution", "64"),
    ],
)
def test_everything_fits_in_100_columns(models, arguments):
    assert max(len(line) for line in models(*arguments)) <= 100


@pytest.mark.parametrize("detail", [(), ("--layers",)])
@pytest.mark.parametrize("name", ["regnety_400mf", "densenet_bc_100_12", "densenet121"])
def test_modules_add_up_to_the_published_cost(models, name, detail):
    lines = models("show", name, *detail)
    start = next(number for number, line in enumerate(lines) if line.startswith("module "))
    rows = [line.replace(",", "").split()[-3:] for line in lines[start + 1 : lines.index("", start)]]
    *modules, total = [tuple(map(int, row)) for row in rows]
    cost = PUBLISHED[name].cost
    assert total == (cost.flops, cost.params, cost.activations)
    assert tuple(map(sum, zip(*modules, strict=True))) == total


def test_options_change_the_network_and_are_documented(models):
    lines = models("show", "regnety_400mf", "stem=cifar", "drop_path=0.1", "strides=[1,2,2,2]")
    assert "for one image of 32 x 32 pixels, 10 classes" in lines
    index = lines.index("  strides=[1, 2, 2, 2]")
    assert lines[index + 1].strip() == "Stride of each stage; empty means 2 everywhere."
    assert "  drop_path=0.1" in lines


def test_every_option_is_documented(models):
    lines = models("show", "densenet121")
    options = [line.partition("=")[0].strip() for line in lines if re.match(r"  \w+=", line)]
    assert options == [
        *("depths", "growth_rate", "stem_width", "stem", "bottleneck"),
        *("compression", "dropout", "dropout_placement"),
    ]


def test_options_are_printed_as_yaml(models):
    stages = f"stages=[{STAGE}, {STAGE}, {STAGE}]"
    text = " ".join(line.strip() for line in models("show", "anynet", stages, "zero_gamma=true"))
    assert f" {stages} From the highest" in text
    assert " zero_gamma=true Initialize" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("regnety_400mf", "stem=cifar", "drop_path=0.1", "--num-classes", "7"),
        ("regnety_400mf", "--num-classes", "7", "stem=cifar", "drop_path=0.1"),
        ("regnety_400mf", "stem=cifar", "--num-classes", "7", "drop_path=0.1"),
        ("--num-classes", "7", "regnety_400mf", "stem=cifar", "drop_path=0.1"),
    ],
)
def test_options_are_accepted_in_any_order(models, arguments):
    lines = models("show", *arguments)
    assert "for one image of 32 x 32 pixels, 7 classes" in lines
    assert "  drop_path=0.1" in lines


@pytest.mark.parametrize("line", _EXAMPLES.splitlines()[1:])
def test_the_examples_work(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    python, module, distrain, *arguments = shlex.split(line)
    assert (python, module, distrain) == ("python", "-m", "distrain")
    assert cli.run(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(("models",), ""), (("models",), "1"), (("models", "--help"), "")]
)
def test_a_closed_stdout_is_not_a_crash(arguments, unbuffered):
    """As with `| head`."""
    command = [sys.executable, "-m", "distrain", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_plot_writes_an_image(models, tmp_path):
    path = tmp_path / "widths.png"
    assert models("plot", "regnetx_4gf", "width_rule=torchvision", "--out", str(path)) == [f"wrote {path}"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_default_plot_file_is_named_after_the_network(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert models("plot", "regnetx_4gf") == ["wrote regnetx_4gf.png"]
    assert (tmp_path / "regnetx_4gf.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_file_without_suffix_is_a_png(models, tmp_path):
    models("plot", "regnetx_4gf", "--out", str(tmp_path / "widths"))
    assert (tmp_path / "widths").read_bytes().startswith(b"\x89PNG")


def test_a_plot_shows_the_line_the_quantized_widths_and_the_stage_widths():
    (axes,) = draw_widths("regnetx_200mf", network_config("regnetx_200mf")).axes
    line, quantized = axes.lines
    blocks = list(range(13))
    assert list(line.get_xdata()) == list(quantized.get_xdata()) == blocks
    assert list(line.get_ydata()) == pytest.approx([24 + 36.44 * block for block in blocks])
    assert list(quantized.get_ydata()) == [24, 56, 152, 152, 152, 152, *[368] * 7]
    (stages,) = axes.collections
    ends = [[0, 0], [1, 1], [2, 5], [6, 12]]
    widths = [24, 56, 152, 368]
    for segment, (start, end), width in zip(stages.get_segments(), ends, widths, strict=True):
        assert segment.flatten().tolist() == pytest.approx([start - 0.4, width, end + 0.4, width])
    assert [text.get_text() for text in axes.texts] == ["1 x 24, g=8", "1 x 56, g=8", "4 x 152, g=8", "7 x 368, g=8"]


def test_a_plot_has_integer_ticks():
    (axes,) = draw_widths("regnet", RegNetConfig(depth=3, w0=16, wa=8.0, wm=2.0, group_width=8)).axes
    assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "regnetz"), "model 'regnetz' is not known: did you mean regnet?"),
        (("show", "regnety_400mf", "stem"), "options: stem: expected key=value, such as stem=cifar"),
        (("show", "regnety_400mf", "stem=[a"), "options: stem=[a: not valid YAML"),
        (("show", "regnety_400mf", "steam=cifar"), "did you mean stem?"),
        (("show", "densenet121", "--resolution", "8"), "image size 8 is too small"),
        (("show", "densenet121", "--resolution", "0"), "image size 0 is too small"),
        (("show", "densenet121", "--num-classes", "0"), "num_classes=0 must be an integer of at least 1"),
        (("plot", "densenet121", "--out", "x.png"), "is not a RegNet: plot needs one"),
        (("plot", "regnety_4gf", "--out", "missing/x.png"), "missing/x.png: cannot be written"),
        (("plot", "regnety_4gf", "--out", "x.xyz"), "x.xyz: cannot be written"),
    ],
)
def test_a_user_error_is_one_line(models, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        models(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
