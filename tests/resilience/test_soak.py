import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.processes import SMALL, environment, readme_command

from distrain.__main__ import main
from distrain.resilience.faults import parse_fault
from distrain.soak.account import Account, find_problems, summarize
from distrain.soak.plan import Action, draw_plan


def test_a_plan_is_reproducible_and_spread_over_the_run():
    faults, actions = draw_plan(seed=3, count=100, steps=2000, ranks=3)
    assert (faults, actions) == draw_plan(seed=3, count=100, steps=2000, ranks=3)
    assert faults != draw_plan(seed=4, count=100, steps=2000, ranks=3)[0]
    assert sorted(step // 20 for step in [entry.step for entry in (*faults, *actions)]) == list(range(100))
    assert {fault.rank for fault in faults} == {0, 1, 2}
    assert len({(fault.kind, fault.failpoint) for fault in faults}) > 15
    assert [parse_fault(str(fault)) for fault in faults] == faults
    assert {action.kind for action in actions} == {"second-start", "other-settings", "two-attempts", "power-cut"}
    # The last checkpoint may have been saved by then, and nothing comes after the last step.
    assert {fault.failpoint for fault in faults if fault.step >= 1900} <= {"train.step", "evaluate.batch"}


def test_where_power_cannot_be_cut_no_cut_is_drawn():
    faults, actions = draw_plan(seed=3, count=100, steps=2000, ranks=2, power_cuts=False)
    assert len(faults) + len(actions) == 100
    assert {action.kind for action in actions} == {"second-start", "other-settings", "two-attempts"}


FAULTS = [
    parse_fault("sigkill@time:5+0.5/1"),
    parse_fault("clock@train.step:7"),
    parse_fault("flip@checkpoint.commit:8"),
]
ACTIONS = [Action("two-attempts", 9, 0.5)]
RIGHT = Account(
    fired=[
        {"fault": "sigkill@time:5+0.5/1", "attempt": 1},
        {"fault": "clock@train.step:7/0", "attempt": 2},
        {"fault": "flip@checkpoint.commit:8/0", "attempt": 2, "checkpoint": "step-00000008"},
    ],
    done=[
        {"action": "two-attempts@time:9+0.5", "attempt": 2, "problem": None},
        {"action": "two-attempts@time:9+0.5", "attempt": 2, "problem": ""},
        {"action": "restarted", "attempt": 3, "problem": ""},
    ],
    attempts=[{"attempt": 1, "cause": ""}, {"attempt": 2, "cause": "exited"}, {"attempt": 4, "cause": "exited"}],
    last_attempt=4,
    losses={1: 0.5, 2: 0.25},
    damaged=["step-00000008"],
    digest="sha256:1",
)  # fmt: skip


def problems_of(**changed: Any) -> list[str]:
    return find_problems(FAULTS, ACTIONS, replace(RIGHT, **changed), {1: 0.5, 2: 0.25}, "sha256:1")


def test_a_soak_in_which_all_is_right_has_no_problems():
    assert problems_of() == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"fired": RIGHT.fired[:2], "damaged": []}, "flip@checkpoint.commit:8/0 fired 0 times"),
        ({"fired": [*RIGHT.fired, RIGHT.fired[0]]}, "sigkill@time:5+0.5/1 fired 2 times"),
        ({"done": RIGHT.done[::2]}, "two-attempts@time:9+0.5 fired 0 times"),
        ({"done": RIGHT.done[:2]}, "attempt 3 ended, and nothing was injected into it"),
        ({"losses": {1: 0.5}}, "1 steps are in no metrics, the first is 2"),
        ({"losses": {1: 0.5, 2: 0.3}}, "1 steps had another loss, the first is 2"),
        ({"damaged": ["step-00000012"]}, "checkpoint step-00000012 is damaged"),
        ({"digest": "sha256:2"}, "other weights: sha256:2, uninterrupted sha256:1"),
        (
            {"attempts": [{"attempt": 2, "cause": "UserError: no"}]},
            "attempt 1 ended as if by a mistake: UserError: no",
        ),
        (
            {"done": [*RIGHT.done[::2], {**RIGHT.done[1], "problem": "both continued"}]},
            "two-attempts@time:9+0.5: both continued",
        ),
    ],
)
def test_what_is_not_as_it_was_planned_is_a_problem(changed, problem):
    assert problems_of(**changed) == [problem]


def test_restarts_across_a_step_of_the_clock_do_not_count_as_hours():
    attempts = [
        {"cause": "exited", "lost_steps": 2, "seconds": {"down": down}} for down in (1.0, 86400.0, -3600.0, 3.0)
    ]
    assert summarize(attempts) == "down 2.00; steps lost 2.0, at most 2"


def soak(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "soak", *words])
    return main()


def test_a_run_too_short_for_its_faults_is_one_line(monkeypatch, capsys, on_dataset):
    assert soak(monkeypatch, "run.name=a", *SMALL, *on_dataset, "train.epochs=1", "--faults", "25") == 78
    assert "is too short for 25 faults: raise train.epochs to get at least 50 steps" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_random_faults_bit_for_bit(on_dataset, tmp_path):
    """The command from README, on a small network and small images."""
    command = readme_command("python -m distrain soak")
    small = (*SMALL, *on_dataset, "batch.lanes=3", "batch.per_lane=4", "train.epochs=15", "checkpoint.every_steps=5")
    limits = ("evaluate.batch=16", "evaluate.every_epochs=0.5", "resilience.patience=4", f"run.dir={tmp_path}")
    output = tmp_path / "soak.json"
    words = [sys.executable, *command[1:], *small, *limits, "--seed", "6", "--json", str(output)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    kinds = [entry["action"].split("@")[0] for entry in results["done"] if entry["problem"] == ""]
    actions = sum(kind != "restarted" for kind in kinds)
    assert len(results["fired"]) + actions == 25
    assert {"second-start", "other-settings", "two-attempts"} < {*kinds}
    assert results["problems"] == []
    assert results["digest"] == results["uninterrupted"]
    assert "the same bits, nothing lost" in done.stdout
    assert "resuming at step" in done.stdout
