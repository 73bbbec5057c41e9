import subprocess
import sys

import pytest
from support.processes import environment

from launch.restart import Attempt, Decision, combine_exit_codes, decide, read_attempt


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([0, 75], 75),
        ([1, 78, 75], 78),
        ([0, 1], 1),
        ([-9, 0], 1),
        ([255, 75], 1),
    ],
    ids=str,
)
def test_a_start_is_done_or_stopped_only_if_all_nodes_agree(codes, code):
    assert combine_exit_codes(codes) == code


@pytest.mark.parametrize(
    ("code", "stop_requested", "end", "decision"),
    [
        (0, False, "done", Decision.DONE),
        (0, True, "done", Decision.DONE),
        (78, False, "", Decision.USER_ERROR),
        (78, True, "", Decision.USER_ERROR),
        (75, False, "stopped by SIGTERM", Decision.REQUEUE),
        (75, False, "stopped by train.max_minutes=5", Decision.REQUEUE),
        (75, False, "stopped by file runs/a/stop", Decision.STOPPED),
        (1, True, "", Decision.REQUEUE),
        (137, True, "stopped by file runs/a/stop", Decision.STOPPED),
        (1, False, "RuntimeError: ...", Decision.START_AGAIN),
        (1, False, "stopped by file runs/a/stop", Decision.START_AGAIN),
    ],
)
def test_the_exit_code_and_the_end_of_the_attempt_decide_how_to_continue(code, stop_requested, end, decision):
    assert decide(code, stop_requested, 3, Attempt(4, end), 0)[0] == decision


def test_three_crashes_in_a_row_without_an_attempt_give_up():
    assert decide(1, False, 5, Attempt(5), 0) == (Decision.START_AGAIN, 1)
    assert decide(1, False, 5, Attempt(5), 1) == (Decision.START_AGAIN, 2)
    assert decide(1, False, 5, Attempt(5), 2) == (Decision.GIVE_UP, 3)


def test_an_attempt_resets_the_count_of_starts_without_progress():
    assert decide(1, False, 5, Attempt(6), 2) == (Decision.START_AGAIN, 0)


@pytest.mark.parametrize(
    "content",
    [None, b"", b'{"attempt"', b"\x00\xff", b"[]", b"null", b"{}", b'{"attempt": null}', b'{"attempt": "x"}'],
    ids=repr,
)
def test_a_missing_empty_or_damaged_record_is_no_attempt(tmp_path, content):
    if content is not None:
        (tmp_path / "attempt.json").write_bytes(content)
    assert read_attempt(tmp_path) == Attempt()


def ask(*words: str) -> str:
    """What batch.sh gets from the policy's command line."""
    command = [sys.executable, "-m", "launch.restart", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout


def test_the_command_line_prints_the_decision_the_attempt_and_the_count(tmp_path):
    assert ask(str(tmp_path)) == "0\n"
    (tmp_path / "attempt.json").write_text('{"attempt": 7, "end": null}')
    assert ask(str(tmp_path)) == "7\n"
    crash = (str(tmp_path), "--code", "1", "--before", "7", "--without-progress", "2")
    assert ask(*crash) == "give-up 7 3\n"
    assert ask(*crash, "--stop-requested") == "requeue 7 2\n"
