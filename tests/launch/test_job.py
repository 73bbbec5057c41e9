from support.processes import SMALL

from distrain import config
from launch import job
from launch.job import Host, Job
from launch.restart import Attempt


class SimulatedStarts(Job):
    """A job on this machine whose starts run nothing: each ends with a code, and may have begun an attempt before."""

    def __init__(self, monkeypatch, folder, starts: list[tuple[int, bool]]) -> None:
        overrides = [*SMALL, f"run.dir={folder}", "run.name=run", "data.train=a.parquet", "data.val=a.parquet"]
        super().__init__(config.load(None, overrides), [Host("here", "localhost")], 1, [], 1)
        self._starts = iter(starts)
        self._attempt = 0
        monkeypatch.setattr(job, "read_attempt", lambda folder: Attempt(self._attempt))

    def _sleep(self, seconds: float) -> None:
        pass

    def _start(self, hosts, job, *options) -> dict[str, int]:
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
