"""Sweeps of real, tiny runs: claimed, killed, continued, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support.processes import README, SMALL, environment, read_metrics, readme_command, train

from distrain.sweep.runner import share_machine
from distrain.sweep.sweep import Sweep

pytestmark = pytest.mark.slow

REGNETS = """\
network: regnet
sample:
  depth: {uniform: [2, 4]}
  w0: {choice: [8, 16]}
  wa: {uniform: [4, 12]}
  wm: {choice: [2.0, 2.5]}
  group_width: {choice: [4, 8]}
fixed: {stem: cifar}
keep: [stages <= 3]
"""
SETTINGS = tuple(word for word in SMALL if not word.startswith("model.name"))


class Command:
    """`distrain sweep run` of two spaces, three networks each."""

    def __init__(self, folder: Path, on_dataset: tuple[str, ...]) -> None:
        self.folder = folder / "sweep"
        self.output = ""
        for name in ("small", "large"):
            extra = "" if name == "small" else "extends: small.yaml\nfixed: {head_width: 16}\n"
            (folder / f"{name}.yaml").write_text(extra or REGNETS)
        self.sizes = ("batch.lanes=2", "batch.per_lane=8", "train.epochs=2", "checkpoint.every_steps=5")
        spaces = str(folder / "small.yaml"), str(folder / "large.yaml")
        self._words = [*spaces, "--out", str(self.folder), *SETTINGS, *on_dataset, *self.sizes]

    def start(self, *words: str, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
        program = ["launch", "sweep", *launcher, "--"] if launcher else ["distrain", "sweep", "run", "--workers", "2"]
        command = [sys.executable, "-m", *program, *self._words, "--n", "3", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment())

    def run(self, *words: str, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
        process = self.start(*words, launcher=launcher)
        output = process.communicate(timeout=600)[0]
        return process.returncode, output


def tool(*words: str) -> str:
    command = [sys.executable, "-m", "distrain", "sweep", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout


@pytest.fixture(scope="module")
def command(on_dataset, tmp_path_factory) -> Command:
    """A sweep during which every process but the last two nodes of a launcher is killed in the middle of a member."""
    command = Command(tmp_path_factory.mktemp("sweep"), on_dataset)
    for wanted in (1, 3):
        process = command.start()
        deadline = time.monotonic() + 400
        while len(list(command.folder.glob("runs/*/checkpoints/step-*"))) < 2 * wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    code, command.output = command.run(launcher=("--nodes", "2"))
    assert code == 0, command.output
    return command


def test_killed_and_joined_processes_lose_no_member_and_train_none_twice(command):
    members = Sweep.open(command.folder).current()
    assert [member.name for member in members] == [f"{s}-{i:06d}" for s in ("small", "large") for i in range(3)]
    assert {member.status for member in members} == {"done"}
    for member in members:
        steps = [
            entry["step"]
            for entry in read_metrics(command.folder / "runs" / member.name)
            if "train/loss" in entry["metrics"]
        ]
        assert steps == sorted(set(steps))
        assert steps[-1] == 25
        assert 0 <= member.error < 1
        assert member.seconds > 0


def test_a_member_is_the_run_that_its_settings_describe(command, on_dataset, tmp_path):
    (line,) = [line for line in tool("best", str(command.folder), "--n", "1").splitlines() if not line.startswith("#")]
    best = min(Sweep.open(command.folder).current(), key=lambda member: member.error)
    assert line == f"model.name=regnet 'model.options={json.dumps(best.options)}'"
    log = (command.folder / "claims" / best.name / "log.txt").read_text()
    assert f"top-1 {1 - best.error:.2%}" in log.splitlines()[-1]


def test_the_report_compares_the_spaces(command, tmp_path):
    printed = tool("report", str(command.folder), "--out", str(tmp_path / "new" / "report.html"))
    assert printed.splitlines()[-1] == f"wrote {tmp_path}/new/report.html"
    page = (tmp_path / "new" / "report.html").read_text()
    assert all(name in page for name in ("small", "large"))
    assert len((tmp_path / "new" / "members.csv").read_text().splitlines()) == 7


def test_status_counts(command):
    best = {
        space: min(member.error for member in Sweep.open(command.folder).current() if member.space == space)
        for space in ("small", "large")
    }
    header, *rows = (line.split() for line in tool("status", str(command.folder)).splitlines())
    assert header[:6] == ["space", "waiting", "running", "done", "failed", "pruned"]
    assert rows == [[space, "0", "0", "3", "0", "0", f"{best[space]:.2%}"] for space in ("small", "large")]


def test_status_says_how_much_is_left(command, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(command.folder, folder)
    for name in ("small-000001", "large-000000"):
        (folder / "claims" / name / "result.json").unlink()
    for number, path in enumerate(sorted(folder.glob("claims/*/result.json"))):
        os.utime(path, (1e9 + 120 * number,) * 2)
    assert tool("status", str(folder)).splitlines()[-1] == "2 left, about 4 min at the latest pace"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.epochs=3",), "this sweep was begun with train.epochs=2.0, not 3.0"),
        (("--seed", "1"), "of this sweep is another network: the space, its conditions or --seed changed"),
        (("--n", "2"), "this sweep has large 2, which is not chosen now"),
        (("--member", "6"), "--member 6: the sweep has 6 members, from 0 on"),
        (("run.name=x",), "run.name=x: the sweep chooses it for each network"),
        (("--halve-at", "1"), "this sweep was begun with --halve-at=[], not [1.0]"),
        (("--halve-at", "2,1"), "--halve-at 2,1: must increase, from above 0 to below train.epochs=2"),
        (("data.train=none.parquet",), "none.parquet: index not found"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(command, words, message):
    code, output = command.run(*words)
    assert code == 78, output
    assert message in output.splitlines()[-1]


def test_the_winner_of_halving_is_the_run_that_it_is_alone(on_dataset, tmp_path):
    command = Command(tmp_path, on_dataset)
    code, output = command.run("--halve-at", "0.5,1", "--fraction", "0.5")
    assert code == 0, output
    members = {member.name: member for member in Sweep.open(command.folder).current()}
    assert sorted(member.status for member in members.values()) == ["done"] + ["pruned"] * 5
    (winner,) = (member for member in members.values() if member.status == "done")
    lengths = sorted(max(entry["step"] for entry in read_metrics(command.folder / "runs" / name)) for name in members)
    assert lengths == [6, 6, 6, 13, 13, 25]
    log = (command.folder / "claims" / winner.name / "log.txt").read_text().splitlines()[-1]
    alone = train(
        tmp_path / "alone", *SETTINGS, *on_dataset, *command.sizes, "model.name=regnet",
        f"model.options={json.dumps(winner.options)}",
    )  # fmt: skip
    assert alone.code == 0, alone.output
    assert alone.output.splitlines()[-1] == log


def test_a_member_that_cannot_train_is_listed_with_its_reason(on_dataset, tmp_path):
    command = Command(tmp_path, on_dataset)
    code, output = command.run("--n", "1", f"loss.class_weights={tmp_path}/none.json")
    assert code == 78, output
    lines = tool("status", str(command.folder)).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        [space, "0", "0", "0", "1", "0", "-"] for space in ("small", "large")
    ]
    assert lines[3].startswith(f"small-000000: failed: loss.class_weights: {tmp_path}/none.json: cannot be read")


def test_the_command_of_readme_trains_all_spaces_and_reports_to_mlflow(on_dataset, tmp_path):
    words = readme_command("python -m distrain sweep run")
    tiny = ("--n", "1", "--flops", "1e4..1e8", "--out", str(tmp_path / "small"), "batch.per_lane=8")
    done = subprocess.run(
        [sys.executable, *words[1:], *tiny, *SETTINGS, *on_dataset, "track.uri="],
        cwd=README.parent,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/small/runs/mlflow.db")
    experiment = client.get_experiment_by_name("distrain").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    (parent,) = (run for name, run in runs.items() if name.startswith("small-"))
    children = [runs[f"{space}-000000"] for space in ("anynetx_a", "anynetx_c", "anynetx_e", "regnetx")]
    assert len(runs) == 5
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    members = Sweep.open(tmp_path / "small").members
    for run, member in zip(children, members, strict=True):
        assert {name: str(value) for name, value in member.parameters.items()}.items() <= run.data.params.items()
    assert "report/index.html" in [artifact.path for artifact in client.list_artifacts(parent.info.run_id, "report")]
    assert (tmp_path / "small" / "report" / "index.html").exists()


def test_the_cores_are_shared_evenly():
    cores = sorted(os.sched_getaffinity(0))
    assert [slot.cores for slot in share_machine(None, 0)] == [(core,) for core in cores]
    assert [slot.cores for slot in share_machine(1, 0)] == [tuple(cores)]
    assert [slot.gpu for slot in share_machine(None, 3)] == ["0", "1", "2"]
    assert [slot.gpu for slot in share_machine(4, 2)] == ["0", "1", "0", "1"]
