import time

import pytest

from launch import job
from launch.job import Host, Job
from launch.restart import Attempt


class SimulatedStarts(Job):
    """A job on this machine whose starts run nothing: each ends with a code, and may have begun an attempt before."""

    def __init__(self, monkeypatch, folder, starts: list[tuple[int, bool]], hosts="a", min_hosts=1) -> None:
        super().__init__(folder / "run", [Host(name, name) for name in hosts], 1, [], min_hosts)
        self._starts = iter(starts)
        self.jobs: list[str] = []
        self.hosts: list[str] = []
        self.sleeps = 0
        self.end = ""
        self._attempt = 0
        monkeypatch.setattr(job, "read_attempt", lambda folder: Attempt(self._attempt, self.end))

    def _sleep(self, seconds: float) -> None:
        self.sleeps += 1

    def _start(self, hosts, job, *options) -> dict[str, int]:
        self.jobs.append(job)
        self.hosts.append("".join(host.name for host in hosts))
        code, begins = next(self._starts)
        self._attempt += begins
        return {host.name: code for host in hosts}


def test_crashes_with_progress_between_them_never_give_up(monkeypatch, tmp_path):
    crashed, failed = (1, True), (1, False)
    starts = [failed, failed, crashed, failed, failed, *[crashed] * 5, (0, True)]
    assert SimulatedStarts(monkeypatch, tmp_path, starts).run() == 0


def test_three_starts_in_a_row_without_an_attempt_give_up(monkeypatch, tmp_path, capsys):
    starts = [(1, True), (1, False), (1, False), (1, False), (0, True)]
    assert SimulatedStarts(monkeypatch, tmp_path, starts).run() == 1
    assert "giving up: 3 starts in a row crashed before training began" in capsys.readouterr().err


def test_two_launches_in_the_same_second_never_use_the_same_name_for_a_start(monkeypatch, tmp_path):
    monkeypatch.setattr("time.time", lambda: 1000.0)
    launches = [SimulatedStarts(monkeypatch, tmp_path, [(1, True), (0, True)]) for _ in range(2)]
    assert [launch.run() for launch in launches] == [0, 0]
    assert len({name for launch in launches for name in launch.jobs}) == 4


def test_after_losing_hosts_a_run_continues_once_enough_are_reachable(monkeypatch, tmp_path, capsys):
    launch = SimulatedStarts(monkeypatch, tmp_path, [(1, True), (0, True)], hosts="abc", min_hosts=2)
    monkeypatch.setattr(Host, "is_reachable", lambda host: host.name in ("a" if launch.sleeps < 3 else "ac"))
    assert launch.run() == 0
    assert launch.hosts == ["abc", "ac"]
    assert launch.sleeps == 3
    assert "waiting for b, c; use --min-nodes 1 to continue without" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "stop_signals", "end", "code"),
    [
        (75, 1, "stopped by SIGTERM", 75),
        (75, 0, "stopped by file run/stop", 75),
        (1, 1, "", 75),
        (1, 2, "", 130),
        (78, 0, "", 78),
        (0, 1, "done", 0),
    ],
)
def test_a_launcher_ends_as_its_last_start(monkeypatch, tmp_path, start, stop_signals, end, code):
    launch = SimulatedStarts(monkeypatch, tmp_path, [(start, True)])
    launch.end, launch._stop_signals = end, stop_signals
    assert launch.run() == code


def test_jobs_together_are_done_once_one_is_and_stop_waiting_for_lost_hosts(monkeypatch, tmp_path):
    lost = SimulatedStarts(monkeypatch, tmp_path, [(255, False)] * 3)
    monkeypatch.setattr(lost, "_wait_for_hosts", lambda: [] if waits_for(lambda: lost._stop_signals) else ["a"])
    assert job.run_together([lost, SimulatedStarts(monkeypatch, tmp_path, [(1, True), (0, True)])]) == 0


@pytest.mark.parametrize(("codes", "together"), [((75, 75), 75), ((78, 75), 78), ((75, 1), 75)])
def test_jobs_together_end_with_the_code_that_says_how_to_continue(monkeypatch, tmp_path, codes, together):
    jobs = [SimulatedStarts(monkeypatch, tmp_path, [(code, True), (75, True)]) for code in codes]
    assert job.run_together(jobs) == together


def waits_for(condition) -> bool:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True
