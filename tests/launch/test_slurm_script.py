import argparse
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import environment

from distrain.errors import UserError
from launch.cli import main, simulated_hosts, ssh_hosts
from launch.job import read_hosts

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
    assert python == f'[ -n "${{PYTHON:-}}" ] || PYTHON={sys.executable}'
    assert Path(sourced.removeprefix(". ")) == Path("launch/batch.sh").resolve()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("slurm",), "nothing to train: give --config FILE"),
        ((*COMMAND, "--gpus", "0"), "--gpus must be at least 1"),
        ((*COMMAND, "train.epoch=3"), "did you mean train.epochs?"),
        ((*COMMAND, "run.name=x\ntouch y"), "contains a line break or another control character"),
        ((*COMMAND, "--partition", "a\n#SBATCH --wrap=x"), "--partition 'a\\n#SBATCH --wrap=x' may have letters"),
        ((*COMMAND, "--time", "1 --uid=0"), "--time '1 --uid=0' may have letters"),
        ((*COMMAND, "--image", "a\nb"), "'a\\nb' contains a line break"),
        (
            (*COMMAND, "track.uri=http://me:s3cret@h"),
            "track.uri=http://***@h would stand in the script, with its secret",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr("sys.argv", ["launch", *words, "--dry-run"])
    assert main() == 78
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_script_quotes_the_name_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch", *COMMAND, "--dry-run", "run.name=it's $(x) #1", "run.dir=/a b"])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --job-name=it_s___x___1" in lines
    (run,) = [line for line in lines if line.startswith("RUN=")]
    assert shlex.split(run) == ["RUN=/a b/it's $(x) #1"]


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a;b", "$(x)", "-x@a", "a b"])
def test_a_host_name_that_ssh_or_a_shell_would_read_as_more_is_refused(host):
    with pytest.raises(UserError, match="is not a host name: write HOST or USER@HOST"):
        read_hosts(f"a,{host}", None)
    assert read_hosts("me@n-1.x,10.0.0.1,fe80::1%eth0", None) == ["me@n-1.x", "10.0.0.1", "fe80::1%eth0"]


def test_variables_reach_a_host_over_the_connection_and_not_on_a_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "it's $(s3cret)")
    (host,) = ssh_hosts(argparse.Namespace(hosts="n1", hostfile=None))
    assert host.command[-2:] == ("--", "n1")
    shell = f'echo "$0" > {tmp_path}/command; exec sh -c "$0"'
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/python")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nprintf %s "$AWS_SESSION_TOKEN" > {tmp_path}/seen\ncat > {tmp_path}/rest\n'
    )
    (tmp_path / "python").chmod(0o755)
    process = replace(host, command=("sh", "-c", shell)).start([])
    process.communicate(b"stop\n")
    assert "s3cret" not in (tmp_path / "command").read_text()
    assert (tmp_path / "seen").read_text() == "it's $(s3cret)"
    assert (tmp_path / "rest").read_text() == "stop\n"


def test_threads_that_the_user_chose_are_kept_on_simulated_hosts(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert simulated_hosts(1, 1)[0].variables == {}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert simulated_hosts(1, 1)[0].variables["OMP_NUM_THREADS"].isdigit()
