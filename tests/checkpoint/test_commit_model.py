"""The commit protocol, searched exhaustively: every order of operations, and at most one fault anywhere."""

from pathlib import Path

import pytest
from support import commit_model
from support.commit_model import SAVE, Model, make_program
from support.processes import Training


def test_no_reachable_state_loses_a_committed_step_or_commits_what_cannot_be_loaded():
    states, violation = Model(make_program()).search()
    assert violation == ""
    assert states > 50_000


@pytest.mark.parametrize(
    ("without", "instead", "violation"),
    [
        ("flush data", "", "step 1 is committed, and a power cut may leave it torn"),
        ("flush metadata", "", "step 1 is committed, and a power cut may leave it torn"),
        ("flush manifest", "", "step 1 is committed, and a power cut may leave it torn"),
        ("flush checkpoints", "", "step 1 was reported as committed and is lost"),
        ("check attempts", "", "attempt 1 writes although attempt 2 has taken over"),
        ("clear", "delete drafts file by file", "step 2 is committed, and a power cut may leave it torn"),
    ],
)
def test_the_search_finds_what_each_operation_is_for(without, instead, violation):
    assert Model(make_program(without, instead)).search()[1] == violation


def test_the_program_saves_by_the_operations_of_the_model(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("OPERATIONS", str(tmp_path / "operations"))
    program = (str(Path(commit_model.__file__).with_name("recording_operations.py")),)
    one_epoch = ("train.epochs=1", "checkpoint.every_steps=6", "checkpoint.keep=2", "checkpoint.keep_best=false")
    run = Training(tmp_path / "run", *settings, *one_epoch, ranks=2, program=program).wait()
    assert run.code == 0, run.output
    for rank, operations in SAVE.items():
        saved = "\n".join(operations)
        first = saved.partition("\nrename final to removed")[0]  # nothing to prune yet
        recorded = (tmp_path / f"operations-{rank}").read_text().strip()
        assert recorded == "\n".join([first, first, saved])
