"""One attempt of a run at a time: claims, heartbeats, and what all ranks must have in common."""

import errno
import multiprocessing
import os
import threading
from dataclasses import asdict, replace

import pytest
from support.processes import SMALL, train

from distrain import config
from distrain.errors import StaleAttemptError, UserError
from distrain.files import write_json
from distrain.parallel.consistency import require_same_start
from distrain.resilience.attempt import Attempt
from distrain.resilience.claim import LAUNCH_VARIABLE, AttemptRecord, Claim, is_alive, newest_attempt
from distrain.resilience.ledger import Ledger
from distrain.resilience.watchdog import Watchdog


def claim(folder, allowed=3, committed=0) -> Claim:
    return Claim(folder, ranks=1, committed=committed, allowed=allowed)


def write_record(folder, record: AttemptRecord) -> None:
    (folder / "attempts").mkdir(exist_ok=True)
    write_json(folder / "attempts" / f"{record.number:08d}.json", asdict(record))


def _claim_and_wait(folder, start, outcomes, release) -> None:
    start.wait()
    try:
        outcomes.put(("claimed", claim(folder).record.number))
        release.wait()
    except UserError as error:
        outcomes.put(("refused", str(error)))


def test_of_starts_at_the_same_moment_one_claims_the_run_and_the_others_are_refused(tmp_path):
    fork = multiprocessing.get_context("fork")
    start, release, outcomes = fork.Barrier(4), fork.Event(), fork.Queue()
    starts = [fork.Process(target=_claim_and_wait, args=(tmp_path, start, outcomes, release)) for _ in range(4)]
    for process in starts:
        process.start()
    results = [outcomes.get(timeout=240) for _ in starts]
    release.set()
    for process in starts:
        process.join(60)
    assert sorted(kind for kind, _ in results) == ["claimed", "refused", "refused", "refused"]
    assert dict(results)["claimed"] == 1
    assert "attempt 1 of this run is alive" in dict(results)["refused"]


def test_an_attempt_that_was_killed_is_followed_by_the_next_number(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.resilience.claim._OBSERVE_S", 0.08)
    write_record(tmp_path, AttemptRecord(41, host="elsewhere", end=None, committed=7))
    following = claim(tmp_path, committed=7)
    assert (following.record.number, following.record.without_progress) == (42, 1)
    following.end("done", crashed=False)
    assert newest_attempt(tmp_path).end == "done"


def test_an_attempt_on_another_machine_is_alive_as_long_as_it_renews_its_heartbeat(tmp_path):
    (tmp_path / "beat").write_text("12 1000.000")
    lost = AttemptRecord(1, host="elsewhere", machine="other", end=None)
    assert not is_alive(lost, tmp_path, wait=lambda seconds: None)
    assert is_alive(lost, tmp_path, wait=lambda seconds: (tmp_path / "beat").write_text("12 1001.000"))
    assert not is_alive(replace(lost, end="done"), tmp_path)


def test_a_process_id_that_another_process_has_now_is_not_the_attempt(tmp_path):
    first = claim(tmp_path)
    assert is_alive(first.record, tmp_path, wait=lambda seconds: None)
    assert not is_alive(replace(first.record, started=first.record.started - 1), tmp_path)
    first.end("done", crashed=False)


def test_a_launcher_that_starts_a_run_again_takes_it_over_from_a_lost_host(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCH_VARIABLE, "4711")
    first = claim(tmp_path)
    second = claim(tmp_path)
    first._ended.set()  # its thread would end this process
    with pytest.raises(StaleAttemptError, match=r"attempt 1 of the run in .* ends: attempt 2 on .* has taken over"):
        first.require_current()
    first.end("RuntimeError", crashed=True)
    assert newest_attempt(tmp_path) == second.record
    monkeypatch.setattr("distrain.resilience.claim._EXIT_S", 0.03)
    monkeypatch.setenv(LAUNCH_VARIABLE, "4712")
    with pytest.raises(UserError, match="attempt 2 of this run is alive"):
        claim(tmp_path)
    second.end("done", crashed=False)


def test_a_record_that_another_start_creates_meanwhile_is_never_overwritten(tmp_path, monkeypatch):
    other = AttemptRecord(1, token="other", host="elsewhere", end="done")
    looks = iter([None, other])
    write_record(tmp_path, other)
    monkeypatch.setattr("distrain.resilience.claim.newest_attempt", lambda folder: next(looks, other))
    mine = claim(tmp_path)
    mine._ended.set()
    assert mine.record.number == 2
    assert newest_attempt(tmp_path).number == 2
    (tmp_path / "attempts" / "00000002.json").unlink()
    assert newest_attempt(tmp_path) == other


def test_an_attempt_with_the_same_number_but_another_token_is_another_one(tmp_path):
    mine = claim(tmp_path)
    mine._ended.set()  # its thread would end this process
    write_record(tmp_path, replace(mine.record, token="other", host="elsewhere"))
    with pytest.raises(StaleAttemptError, match="attempt 1 on elsewhere has taken over"):
        mine.require_current()


def test_attempts_without_progress_are_forgiven_after_a_new_checkpoint(tmp_path):
    write_record(tmp_path, AttemptRecord(5, end="crashed", committed=7, without_progress=2))
    with pytest.raises(UserError, match="3 attempts in a row ended without a checkpoint after step 7"):
        claim(tmp_path, committed=7)
    forgiven = claim(tmp_path, committed=14)
    assert (forgiven.record.number, forgiven.record.without_progress) == (6, 0)
    forgiven.end("done", crashed=False)


def test_records_deleted_under_a_live_attempt_do_not_end_it(tmp_path):
    live = claim(tmp_path)
    for path in (tmp_path / "attempts").iterdir():
        path.unlink()
    live.require_current()
    live.end("done", crashed=False)
    assert newest_attempt(tmp_path).end == "done"


def test_a_heartbeat_that_fails_once_is_followed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.resilience.claim._BEAT_S", 0.02)
    pwrite, failures, renewed = os.pwrite, [OSError(errno.ENOSPC, "No space left on device")], threading.Event()

    def fail_once(file, data, offset):
        if failures:
            raise failures.pop()
        renewed.set()
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_once)
    live = claim(tmp_path)
    assert renewed.wait(20)
    live.end("done", crashed=False)


def test_a_step_that_cannot_be_recorded_does_not_end_training(tmp_path, monkeypatch, caplog):
    live = claim(tmp_path)
    ledger = Ledger(tmp_path, live)
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    ledger.record_step(1)
    assert f"{tmp_path}: the attempt cannot be recorded: No space left" in caplog.text
    live.end("done", crashed=False)


def test_the_cause_that_an_attempt_records_has_no_secrets(group, on_dataset, tmp_path):
    settings = config.load(None, [*SMALL, *on_dataset, f"run.dir={tmp_path}", "run.name=run"])
    with pytest.raises(RuntimeError), Attempt(settings, group, Watchdog(group, tmp_path, 0)):
        raise RuntimeError("http://me:s3cret@host refused")
    assert newest_attempt(tmp_path / "run").end == "RuntimeError: http://***@host refused"


def test_an_attempt_exits_wherever_it_is_once_a_newer_one_has_started(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("distrain.resilience.claim._BEAT_S", 0.02)
    codes = []

    def end_thread(code):
        codes.append(code)
        first._ended.set()

    monkeypatch.setattr("os._exit", end_thread)
    first = claim(tmp_path)
    write_record(tmp_path, replace(first.record, number=2, token="other"))
    assert first._ended.wait(20)
    assert codes == [1]
    assert "attempt 1 of the run in" in capfd.readouterr().err


def test_only_the_last_records_are_kept(tmp_path):
    for _ in range(5):
        claim(tmp_path).end("done", crashed=False)
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["00000004.json", "00000005.json"]


def test_ranks_that_were_started_with_other_settings_are_refused(settings, tmp_path):
    by_rank = ("--no-python", "sh", "-c", 'exec python -m distrain "$@" optimizer.lr=0.0$((5 + RANK))', "-")
    refused = train(tmp_path / "run", *settings, ranks=2, program=by_rank)
    assert "exitcode  : 78" in refused.output
    (line,) = refused.lines
    assert "was started with optimizer.lr=0.06 and rank 0 on" in line
    assert line.endswith("with optimizer.lr=0.05: start all ranks with the same command, code and environment")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["optimizer.lr", "versions", "OMP_NUM_THREADS", "the code's digest"])
def test_a_rank_that_differs_from_the_main_rank_in_anything_is_refused(group, monkeypatch, key):
    require_same_start(group, {"optimizer.lr": 0.1})
    broadcast = group.broadcast
    monkeypatch.setattr(group, "broadcast", lambda own: broadcast(({**own[0], key: "other"}, "main-host")))
    with pytest.raises(UserError, match=f"was started with {key}=.* and rank 0 on main-host with {key}=other: start"):
        require_same_start(group, {"optimizer.lr": 0.1})
