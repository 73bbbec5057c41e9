import os
import subprocess
import sys

import pytest


def distrain(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "distrain", *arguments], capture_output=True, text=True, env=environment
    )


def test_help_shows_the_first_run_the_tools_and_the_exit_codes():
    shown = distrain("--help").stdout
    for expected in (
        "python -m distrain shards fetch cifar10 --out data/cifar10",
        "torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml",
        "models",
        "shards",
        "78  a mistake in the configuration",
    ):
        assert expected in shown


@pytest.mark.parametrize("tool", ["models", "shards", "bench"])
def test_every_tool_explains_itself(tool):
    shown = distrain(tool, "--help")
    assert shown.returncode == 0
    assert "COMMAND" in shown.stdout


def test_a_mistake_is_one_line_and_exit_78():
    refused = distrain("--config", "configs/quickstart.yaml", "batch.lane=3")
    assert refused.returncode == 78
    assert refused.stderr == "distrain: batch.lane=3: unknown key batch.lane: did you mean batch.lanes?\n"
    assert refused.stdout == ""


def test_an_unknown_model_is_refused_before_any_work_with_the_nearest_name():
    refused = distrain("--config", "configs/quickstart.yaml", "model.name=regnety_16g")
    assert refused.returncode == 78
    assert refused.stderr == "distrain: model 'regnety_16g' is not known: did you mean regnety_16gf?\n"


def test_settings_may_come_before_between_and_after_options():
    shown = distrain(
        "train.epochs=7", "--config", "configs/quickstart.yaml", "run.seed=3", "--print-config", "augment.flip=0"
    )
    assert shown.returncode == 0
    assert all(line in shown.stdout for line in ("  epochs: 7.0 ", "  seed: 3 ", "  flip: 0.0 "))


def test_print_config_shows_the_whole_configuration_and_does_nothing_else():
    shown = distrain("--config", "configs/quickstart.yaml", "--print-config")
    assert shown.returncode == 0
    assert "  name: densenet_bc_22_12 " in shown.stdout
    assert "  lanes: 2 " in shown.stdout
    assert shown.stderr == ""
