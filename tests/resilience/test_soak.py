import json
from pathlib import Path

import pytest
from support.processes import SMALL, readme_command

from distrain.__main__ import main
from distrain.soak.plan import draw_faults


def test_faults_are_reproducible_and_spread_over_the_run():
    faults = draw_faults(seed=3, count=50, steps=1000, ranks=3)
    assert faults == draw_faults(seed=3, count=50, steps=1000, ranks=3)
    assert faults != draw_faults(seed=4, count=50, steps=1000, ranks=3)
    assert [fault.step // 20 for fault in faults] == list(range(50))
    assert {fault.rank for fault in faults} == {0, 1, 2}
    assert len({(fault.kind, fault.failpoint) for fault in faults}) > 15


def soak(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "soak", *words])
    return main()


def test_a_run_too_short_for_its_faults_is_one_line(monkeypatch, capsys, on_dataset):
    assert soak(monkeypatch, "run.name=a", *SMALL, *on_dataset, "train.epochs=1", "--faults", "25") == 78
    assert "is too short for 25 faults: raise train.epochs to get at least 50 steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_survives_random_faults_bit_for_bit(monkeypatch, capsys, on_dataset, tmp_path):
    """The command from README, on a small network and small images."""
    monkeypatch.chdir(Path(__file__).parents[2])
    command = readme_command("python -m distrain soak")
    small = (*SMALL, *on_dataset, "batch.lanes=3", "batch.per_lane=4", "train.epochs=15", "checkpoint.every_steps=5")
    limits = ("evaluate.batch=16", "evaluate.every_epochs=0.5", "resilience.patience=4", f"run.dir={tmp_path}")
    output = tmp_path / "soak.json"
    assert soak(monkeypatch, *command[4:], *small, *limits, "--seed", "1", "--json", str(output)) == 0
    results = json.loads(output.read_text())
    assert len(results["fired"]) == 25
    assert results["digests"]["soaked"] == results["digests"]["uninterrupted"]
    shown = capsys.readouterr().out
    assert "the same bits" in shown
    assert "resuming at step" in shown
