import json
import subprocess
import sys

import pytest
from support.processes import environment

from launch.restart import Attempt, Decision, History, combine_exit_codes, decide, read_attempt


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
        (75, False, "stopped by train.stop_epoch=2", Decision.STOPPED),
        (1, True, "", Decision.REQUEUE),
        (137, True, "stopped by file runs/a/stop", Decision.STOPPED),
        (1, False, "RuntimeError: ...", Decision.START_AGAIN),
        (1, False, "stopped by file runs/a/stop", Decision.START_AGAIN),
    ],
)
def test_the_exit_code_and_the_end_of_the_attempt_decide_how_to_continue(code, stop_requested, end, decision):
    assert decide(code, stop_requested, History(3), Attempt(4, end))[0] == decision


def test_a_stop_file_that_ended_an_earlier_attempt_does_not_keep_a_job_from_being_requeued():
    assert decide(75, True, History(4), Attempt(4, "stopped by file runs/a/stop"))[0] == Decision.REQUEUE


def crash(attempts: list[Attempt]) -> list[tuple[Decision, int]]:
    """The decision and the pause after each of several starts that crash, given the newest attempt after each."""
    history, found = History(5, 100), []
    for newest in attempts:
        decision, history = decide(1, False, history, newest)
        found.append((decision, history.pause))
    return found


def test_three_crashes_in_a_row_without_an_attempt_give_up():
    decisions = [decision for decision, _ in crash([Attempt(6, "", 100)] * 4)]  # the first of these did begin one
    assert decisions == [Decision.START_AGAIN] * 3 + [Decision.GIVE_UP]


def test_crashes_that_are_not_in_a_row_never_give_up():
    numbers = [5, 5, 6, 6, 6, 7, 7, 7, 8]
    assert {decision for decision, _ in crash([Attempt(number) for number in numbers])} == {Decision.START_AGAIN}


def test_pauses_double_up_to_a_minute_until_there_is_a_new_checkpoint():
    crashes = [Attempt(6 + number, "", 100) for number in range(8)] + [Attempt(14, "", 120), Attempt(15, "", 120)]
    assert [pause for _, pause in crash(crashes)] == [1, 2, 4, 8, 16, 32, 60, 60, 1, 2]


def write_record(folder, content: bytes) -> None:
    (folder / "attempts").mkdir()
    (folder / "attempts" / "00000007.json").write_bytes(content)


def test_without_a_record_there_is_no_attempt(tmp_path):
    assert read_attempt(tmp_path) == Attempt()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"number"',
        b"\x00\xff",
        b"[]",
        b"null",
        b"{}",
        b'{"number": 7, "end": 1}',
        b'{"number": 8, "end": "done"}',
    ],
    ids=repr,
)
def test_an_empty_or_damaged_record_counts_as_an_attempt_that_was_killed(tmp_path, content):
    write_record(tmp_path, content)
    assert read_attempt(tmp_path) == Attempt(7, "")


def test_the_attempts_at_a_sweep_are_those_at_its_members(tmp_path):
    for name, number, end in (("a-000000", 3, "exit code 0"), ("a-000001", 1, None)):
        folder = tmp_path / "claims" / name / "attempts"
        folder.mkdir(parents=True)
        content = {"number": number, "end": end, "committed": 0}
        (folder / f"{number:08d}.json").write_text(json.dumps(content))
    assert read_attempt(tmp_path) == Attempt(4, "", 1)


def ask(*words: str) -> str:
    """What batch.sh gets from the policy's command line."""
    command = [sys.executable, "-m", "launch.restart", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment()).stdout


def test_the_command_line_prints_the_decision_the_pause_and_the_history(tmp_path):
    assert ask(str(tmp_path)) == "0 -1 0 0\n"
    write_record(tmp_path, b'{"number": 7, "committed": 20}')
    assert ask(str(tmp_path)) == "7 20 0 0\n"
    crash = (str(tmp_path), "--code", "1", "--history", "7", "20", "2", "4")
    assert ask(*crash) == "give-up 16 7 20 3 5\n"
    assert ask(*crash, "--stop-requested") == "requeue 0 7 20 0 0\n"
