"""Searches over the settings of real, tiny runs: killed, continued, extended, halved, refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from support.processes import SMALL, environment, read_metrics

from distrain.sweep.sweep import Sweep

pytestmark = pytest.mark.slow

VARIED = ("--vary", "optimizer.lr=log:0.001..1", "--vary", "optimizer.momentum=0.3..0.9:0.3")
LENGTH = ("batch.lanes=2", "batch.per_lane=8", "train.epochs=2", "checkpoint.every_steps=5")


class Command:
    """`distrain sweep tune` of three members."""

    def __init__(self, folder: Path, on_dataset: tuple[str, ...]) -> None:
        self.folder = folder / "tuned"
        self._words = ["--out", str(self.folder), *SMALL, *on_dataset, *LENGTH, "--n", "3", "--workers", "2"]

    def start(self, *words: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "distrain", "sweep", "tune", *self._words, *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment())

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        output = process.communicate(timeout=200)[0]
        return process.returncode, output


def tool(*words: str) -> str:
    command = [sys.executable, "-m", "distrain", "sweep", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=True).stdout


@pytest.fixture(scope="module")
def command(on_dataset, tmp_path_factory) -> Command:
    """A search that was killed in the middle of two members, continued, and extended by a fourth."""
    command = Command(tmp_path_factory.mktemp("tune"), on_dataset)
    process = command.start(*VARIED)
    deadline = time.monotonic() + 120
    while len(list(command.folder.glob("runs/*/checkpoints/step-*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second, refusal = command.run(*VARIED)
    assert (second, "another process tunes in it" in refusal) == (78, True), refusal
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for words in ((), ("--n", "4")):
        code, output = command.run(*VARIED, *words)
        assert code == 0, output
    return command


def test_a_killed_search_continues_with_the_same_trials_and_tells_each_once(command):
    members = Sweep.open(command.folder).current()
    assert [member.status for member in members] == ["done"] * 4
    trials = optuna.load_study(study_name="tune", storage=f"sqlite:///{command.folder / 'optuna.db'}").trials
    assert [trial.value for trial in trials] == [member.error for member in members]
    assert [trial.params["optimizer.lr"] for trial in trials] == [
        member.parameters["optimizer.lr"] for member in members
    ]
    for member in Sweep.open(command.folder).trained:
        entries = read_metrics(command.folder / "runs" / member.name)
        steps = [entry["step"] for entry in entries if "train/loss" in entry["metrics"]]
        assert steps == list(range(1, 26))


def test_the_best_settings_are_printed_as_those_of_a_run(command):
    assert tool("status", str(command.folder)) == "tune: 4 done\n"
    best = min(Sweep.open(command.folder).current(), key=lambda member: member.error)
    about, line = tool("best", str(command.folder), "--n", "1").splitlines()
    assert about.startswith(f"# {best.name}: error {best.error:.2%}")
    assert line.startswith("model.name=densenet_bc_10_4 ")
    assert line.endswith(
        f" optimizer.lr={best.parameters['optimizer.lr']} optimizer.momentum={best.parameters['optimizer.momentum']}"
    )


def test_the_report_of_a_search(command, tmp_path):
    assert "tune: 4 of 4 done" in tool("report", str(command.folder), "--out", str(tmp_path / "report.html"))
    assert "optimizer.lr" in (tmp_path / "members.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vary", "optimizer.lr=0.1..1"), "begun with --vary optimizer.lr=log:0.001..1, not 0.1..1"),
        ((*VARIED, "--vary", "loss.label_smoothing=0..0.2"), "begun without --vary loss.label_smoothing: use that"),
        ((*VARIED, "train.epochs=3"), "this sweep was begun with train.epochs=2.0, not 3.0"),
        ((*VARIED, "model.options={dropout: 0.1}"), "this sweep was begun with model.options={}, not {'dropout': 0.1}"),
        ((*VARIED, "--seed", "1"), "this sweep was begun with --seed=0, not 1"),
        ((*VARIED, "--halve-at", "1"), "this sweep was begun with --halve-at=[], not [1.0]"),
        ((*VARIED, "run.dir=x"), "run.dir=x: the sweep sets it: leave it out"),
        ((*VARIED, "data.train=none.parquet"), "none.parquet: index not found"),
    ],
)
def test_another_search_in_the_folder_is_refused(command, words, message):
    code, output = command.run(*words)
    assert code == 78, output
    assert message in output.splitlines()[-1]


def test_random_settings_are_halved(on_dataset, tmp_path):
    command = Command(tmp_path, on_dataset)
    code, output = command.run(*VARIED, "--halve-at", "0.5", "--fraction", "0.4")
    assert code == 0, output
    members = Sweep.open(command.folder).current()
    assert sorted(member.status for member in members) == ["done", "pruned", "pruned"]
    (winner,) = (member for member in members if member.status == "done")
    assert f"best: optimizer.lr={winner.parameters['optimizer.lr']}" in output.splitlines()[-1]
    assert not (command.folder / "optuna.db").exists()


def test_the_result_compares_the_best_settings_with_the_configuration(on_dataset, tmp_path):
    command = Command(tmp_path, on_dataset)
    code, output = command.run("--vary", "optimizer.lr=choice:0.05,1e-9", "--n", "2")
    assert code == 0, output
    first, *_ = Sweep.open(command.folder).current()
    assert first.parameters == {"optimizer.lr": 0.05}
    assert output.splitlines()[-1] == (
        f"best: optimizer.lr=0.05: error {first.error:.2%}; with the configuration's own: {first.error:.2%}"
    )
