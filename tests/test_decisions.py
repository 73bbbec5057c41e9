from pathlib import Path

import pytest

from distrain.decisions import RunDecisions
from distrain.errors import UserError


def test_a_decision_is_made_once_and_kept(tmp_path):
    decisions = RunDecisions(tmp_path / "run")
    assert decisions.get("loader", lambda: "torch") == "torch"
    assert RunDecisions(tmp_path / "run").get("loader", lambda: "dali") == "torch"
    decisions.set("loader", "dali")
    assert decisions.get("loader", lambda: "torch") == "dali"


CURE = "restore it; or write {} to it, and the run measures and decides again, which may change its results"


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_text(path.read_text().replace("torch", "dali"))]
)
def test_a_damaged_or_missing_file_of_decisions_is_replaced_by_its_copy(damage, tmp_path):
    RunDecisions(tmp_path).set("loader", "torch")
    damage(tmp_path / "decisions.json")
    assert RunDecisions(tmp_path).get("loader", lambda: "other") == "torch"


def test_a_run_with_checkpoints_and_no_decisions_is_not_measured_again_silently(tmp_path):
    (tmp_path / "checkpoints/step-00000007").mkdir(parents=True)
    with pytest.raises(UserError, match=r"decisions\.json: missing: restore it; or write {} to it"):
        RunDecisions(tmp_path).get("loader", lambda: "torch")
    (tmp_path / "decisions.json").write_text("{}")
    assert RunDecisions(tmp_path).get("loader", lambda: "torch") == "torch"


@pytest.mark.parametrize("content", ["", "{"])
def test_an_unreadable_file_of_decisions_is_one_line_with_the_cure(content, tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        RunDecisions(tmp_path).get("loader", lambda: "torch")
    assert str(raised.value) == f"{path}: not readable as JSON: {CURE}"
