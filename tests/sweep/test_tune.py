"""`sweep tune`: what it prints and refuses, by simulated training; searches of real, tiny runs, killed and halved."""

import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest
from support.processes import README, SMALL, environment, read_metrics, readme_command

from distrain.__main__ import main
from distrain.sweep.runner import Runner
from distrain.sweep.sweep import Sweep
from distrain.sweep.tuner import only_tuner

VARIED = ("--vary", "optimizer.lr=log:0.001..1", "--vary", "optimizer.momentum=0.3..0.9:0.3")
LENGTH = ("batch.lanes=2", "batch.per_lane=8", "train.epochs=2", "checkpoint.every_steps=5")
CHOICE = ("--vary", "optimizer.lr=choice:0.05,1e-9")


def simulated_training(runner):
    """In place of Runner.run: the error of a member is its learning rate."""
    sweep = runner._sweep
    while runner._propose() or sweep.due():
        for member, _ in sweep.due():
            sweep.claim_folder(member).mkdir(parents=True, exist_ok=True)
            sweep.record(member, member.settings["optimizer.lr"])
    return 0


@pytest.fixture
def call(monkeypatch, capsys, on_dataset, tmp_path):
    """Run a subcommand, its training simulated; return the exit code and the lines it printed."""
    monkeypatch.setattr(Runner, "run", simulated_training)
    tune = ("--out", str(tmp_path / "tuned"), *SMALL, *on_dataset, *LENGTH, "--n", "4", "--workers", "1")

    def call(command, *words):
        arguments = tune if command == "tune" else (str(tmp_path / "tuned"),)
        monkeypatch.setattr("sys.argv", ["distrain", "sweep", command, *arguments, *words])
        code = main()
        printed = capsys.readouterr()
        return code, (printed.out + printed.err).splitlines()

    return call


def test_the_result_compares_the_best_settings_with_the_configuration_by_simulated_training(call):
    code, lines = call("tune", *VARIED, "--n", "12")
    assert code == 0
    best = lines[-1].removeprefix("best: optimizer.lr=").split()[0]
    assert lines[-1].startswith(f"best: optimizer.lr={best} optimizer.momentum=0.")
    assert lines[-1].endswith(f": error {float(best):.2%}; with the configuration's own: 5.00%")
    assert float(best) < 0.05


def test_the_command_of_readme_searches_by_simulated_training(call, monkeypatch, tmp_path):
    words = readme_command("python -m distrain sweep tune")
    monkeypatch.chdir(README.parent)
    ours = [str(tmp_path / "tuned") if word == "runs/tuned" else word for word in words[5:]]
    code, lines = call("tune", *ours)
    assert code == 0, lines
    assert re.fullmatch(r"best: optimizer.lr=\S+ schedule.warmup_epochs=\S+: error \S+; with .* own: 5.00%", lines[-1])
    assert call("status")[1][1].split()[:4] == ["tune", "0", "0", "12"]


def test_the_best_settings_are_printed_as_those_of_a_run_by_simulated_training(call, tmp_path):
    call("tune", *CHOICE, "--n", "8", "model.options={dropout: 0.1}")
    assert call("status")[1][1].split()[:4] == ["tune", "0", "0", "8"]
    assert call("best", "--n", "1")[1][1] == "model.name=densenet_bc_10_4 'model.options={\"dropout\": 0.1}' " + (
        "optimizer.lr=1e-09"
    )
    report = tmp_path / "report.html"
    assert "tune: 8 of 8 done" in call("report", "--out", str(report))[1]
    assert "optimizer.lr" in report.with_name("members.csv").read_text().splitlines()[0].split(",")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vary", "optimizer.lr=0.1..1"), "begun with --vary optimizer.lr=log:0.001..1, not 0.1..1"),
        ((*VARIED, "--vary", "loss.label_smoothing=0..0.2"), "begun without --vary loss.label_smoothing: use that"),
        ((*VARIED[:2],), "begun with --vary optimizer.momentum=0.3..0.9:0.3: use that"),
        ((*VARIED, "train.epochs=3"), "this sweep was begun with train.epochs=2.0, not 3.0"),
        ((*VARIED, "model.options={dropout: 0.1}"), "this sweep was begun with model.options={}, not {'dropout': 0.1}"),
        ((*VARIED, "--seed", "1"), "this sweep was begun with --seed=0, not 1"),
        ((*VARIED, "--halve-at", "1"), "this sweep was begun with --halve-at=[], not [1.0]"),
        ((*VARIED, "run.dir=x"), "run.dir=x: the sweep sets it: leave it out"),
        ((*VARIED, "data.train=none.parquet"), "none.parquet: index not found"),
        (("--vary", "optimizer.momentum=0..0.9"), "optimizer.nesterov=true needs optimizer.momentum above 0"),
    ],
)
def test_another_search_in_the_folder_is_refused(call, words, message):
    assert call("tune", *VARIED, "--n", "1")[0] == 0
    code, lines = call("tune", *words)
    assert code == 78
    assert message in lines[-1]


def test_a_second_process_is_refused(call, tmp_path):
    with only_tuner(tmp_path / "tuned"):
        code, lines = call("tune", *VARIED)
    assert (code, len(lines)) == (78, 2)
    assert "tuned: another process tunes in it: wait for it, stop it, or use another --out" in lines[-1]


def test_without_optuna_only_halving_works(call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, lines = call("tune", *VARIED)
    assert code == 78
    assert "optuna is not installed: pip install 'distrain[sweep]'" in lines[-1]
    assert not (tmp_path / "tuned").exists()
    assert call("tune", *VARIED, "--halve-at", "1")[0] == 0


def start(folder, on_dataset, *words):
    command = [sys.executable, "-m", "distrain", "sweep", "tune", "--out", str(folder), *SMALL, *on_dataset, *LENGTH]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--n", "3", "--workers", "2", *VARIED, *words], stdout=pipe, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_search_continues_with_the_same_trials_and_tells_each_once(on_dataset, tmp_path):
    process = start(tmp_path, on_dataset)
    deadline = time.monotonic() + 400
    while len(list(tmp_path.glob("runs/*/checkpoints/step-*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun = Sweep.open(tmp_path).members
    for words in ((), ("--n", "4")):
        process = start(tmp_path, on_dataset, *words)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
    members = Sweep.open(tmp_path).current()
    assert [member.status for member in members] == ["done"] * 4
    assert [member.settings for member in members[: len(begun)]] == [member.settings for member in begun]
    trials = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'optuna.db'}").trials
    assert [(trial.value, trial.params["optimizer.lr"]) for trial in trials] == [
        (member.error, member.parameters["optimizer.lr"]) for member in members
    ]
    for member in members:
        entries = read_metrics(tmp_path / "runs" / member.name)
        assert [entry["step"] for entry in entries if "train/loss" in entry["metrics"]] == list(range(1, 26))


@pytest.mark.slow
def test_random_settings_are_halved(on_dataset, tmp_path):
    process = start(tmp_path, on_dataset, "--halve-at", "0.5", "--fraction", "0.4")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    members = Sweep.open(tmp_path).current()
    assert sorted(member.status for member in members) == ["done", "pruned", "pruned"]
    (winner,) = (member for member in members if member.status == "done")
    assert members[0].parameters["optimizer.lr"] == 0.05  # of the configuration
    own = f"{members[0].error:.2%}{' when pruned' if members[0].status == 'pruned' else ''}"
    settings = " ".join(f"{key}={value}" for key, value in winner.parameters.items())
    best = f"best: {settings}: error {winner.error:.2%}"
    assert output.splitlines()[-1] == f"{best}; with the configuration's own: {own}"
    assert not (tmp_path / "optuna.db").exists()
