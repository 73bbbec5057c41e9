"""The commands in README work as written there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import README, SMALL, environment, readme_command

from distrain.__main__ import main
from distrain.errors import EXIT_DONE

EXTRA = {"parallel.offload=true": ["parallel.strategy=zero1"]}
ROOT = Path(__file__).parents[1]
TEXT = README.read_text()


def run(words: list[str]) -> str:
    """Run a command with this interpreter's tools and return its output."""
    tools = {"torchrun": ["-m", "torch.distributed.run", "--standalone"], "python": []}
    done = subprocess.run(
        [sys.executable, *tools[words[0]], *words[1:]], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_changed_run_trains(on_dataset, tmp_path):
    small = [f"run.dir={tmp_path}", *on_dataset, "track.uri=none", "train.epochs=1", "schedule.warmup_epochs=0"]
    output = run(
        [
            *readme_command("torchrun --nproc-per-node 2 -m distrain --config configs/quickstart.yaml run.name=mine"),
            *small,
        ]
    )
    assert "done: top-1" in output
    assert (tmp_path / "mine" / "checkpoints").is_dir()


def test_all_ways_to_run_train(on_dataset, tmp_path):
    small = [f"run.dir={tmp_path}", *on_dataset, *SMALL, "train.epochs=1", "evaluate.batch=64"]
    ways = re.findall(r"^\| one (?:process|machine) \| `(.*)` \|$", TEXT, re.MULTILINE)
    assert len(ways) == 2
    for number, way in enumerate(ways):
        assert "done: top-1" in run([*shlex.split(way), *small, f"run.name={number}"])


def is_accepted(monkeypatch, *overrides: str) -> bool:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["distrain", "--config", "configs/quickstart.yaml", *overrides, "--print-config"])
    return main() == EXIT_DONE


def test_the_settings_of_strategy_precision_and_memory_exist(monkeypatch):
    table = TEXT[TEXT.index("## Strategy, precision") : TEXT.index("compares them with")]
    overrides = re.findall(r"`((?:parallel|train)\.[a-z_]+=[^`]*)`", table)
    assert len(overrides) == 6
    for override in overrides:
        assert is_accepted(monkeypatch, override, *EXTRA.get(override, []))


@pytest.mark.slow
def test_the_benchmark_of_steps_runs():
    words = readme_command("python -m distrain bench step model.name=regnety_400mf")
    small = ["--rounds", "1", "--steps", "1", "data.image_size=32", "batch.lanes=2", "batch.per_lane=2"]
    assert "bare PyTorch loop" in run([*(word for word in words if word != "--memory"), *small])


def test_the_options_of_the_table_exist(monkeypatch):
    table = TEXT[TEXT.index("| torchvision's reference") : TEXT.index("## Ways to run")]
    overrides = re.findall(r"`([a-z_.]+=[^`]*)`", table)
    assert len(overrides) == 7
    words = [word for override in overrides for word in override.split()]
    assert is_accepted(monkeypatch, *words, "train.epochs=9")
