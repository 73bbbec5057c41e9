import pytest

from distrain.decisions import RunDecisions
from distrain.errors import UserError


def test_a_decision_is_made_once_and_kept(tmp_path):
    decisions = RunDecisions(tmp_path / "run")
    assert decisions.get("loader", lambda: "torch") == "torch"
    assert RunDecisions(tmp_path / "run").get("loader", lambda: "dali") == "torch"
    decisions.set("loader", "dali")
    assert decisions.get("loader", lambda: "torch") == "dali"


@pytest.mark.parametrize("content", ["", "{"])
def test_an_unreadable_file_of_decisions_is_one_line_with_the_cure(content, tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        RunDecisions(tmp_path).get("loader", lambda: "torch")
    assert str(raised.value) == f"{path}: not readable as JSON: delete it; what the run decided is measured again"
