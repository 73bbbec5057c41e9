import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment

COMMAND = ("slurm", "--config", "configs/regnety_16gf.yaml")


def launch(*words: str, folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())


def test_the_script_requests_as_many_nodes_as_the_lanes_need():
    words = ("--dry-run", "--gpus", "4", "--partition", "gpu", "--account", "us", "--time", "2:00:00")
    done = launch(*COMMAND, *words, "--image", "/images/distrain.sif", "train.epochs=30", "augment.crop_scale=[0.1, 1]")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    # 32 lanes, 4 GPUs per node.
    for option in ("nodes=8", "gpus-per-node=4", "partition=gpu", "account=us", "time=2:00:00", "requeue"):
        assert f"#SBATCH --{option}" in lines
    assert "RUN=runs/regnety_16gf" in lines
    assert "CONTAINER=/images/distrain.sif" in lines
    assert "overrides=(train.epochs=30 'augment.crop_scale=[0.1, 1]')" in lines


def test_the_scripts_in_slurm_have_the_options_that_it_generates():
    done = launch(*COMMAND, "--dry-run")
    script = Path("slurm/regnety_16gf.sh").read_text()
    shipped = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert [line for line in done.stdout.splitlines() if line.startswith("#SBATCH")] == shipped


def test_outside_of_a_checkout_the_script_uses_the_installed_launcher(tmp_path):
    done = launch("slurm", "--dry-run", "--config", str(Path(COMMAND[2]).resolve()), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, python, sourced = done.stdout.splitlines()
    assert python == f'PYTHON="${{PYTHON:-{sys.executable}}}"'
    assert Path(sourced.removeprefix(". ")) == Path("launch/batch.sh").resolve()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("slurm",), "nothing to train: give --config FILE"),
        ((*COMMAND, "--gpus", "0"), "--gpus must be at least 1"),
        ((*COMMAND, "train.epoch=3"), "did you mean train.epochs?"),
    ],
)
def test_mistakes_are_reported_in_one_line(words, message):
    done = launch(*words)
    assert done.returncode == 78
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
