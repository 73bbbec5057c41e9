"""Checkpoints of whole runs: which are kept, what happens on a full disk, and the `checkpoints` tool."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from support.processes import Training, train

from distrain.__main__ import main
from distrain.checkpoint.files import committed, read_best, step_of


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    result = train(tmp_path_factory.mktemp("runs") / "uninterrupted", *settings)
    assert result.code == 0, result.output
    return result


def steps_kept(folder: Path) -> list[int]:
    return [step_of(path) for path in committed(folder / "checkpoints")]


def test_the_newest_the_best_and_every_nth_are_kept(settings, tmp_path):
    kept = train(
        tmp_path / "run", *settings, "checkpoint.keep=2", "checkpoint.keep_every_steps=14", "track.every_steps=20"
    )
    best, top1 = read_best(kept.folder / "checkpoints")
    assert top1 == max(kept.series("val/top1").values())
    assert kept.series("val/top1")[best] == top1
    assert steps_kept(kept.folder) == sorted({14, 28, 42, 49, 51, best})
    assert set(kept.series("checkpoint/stall_seconds")) == {*range(7, 51, 7), 51}
    assert list(kept.series("train/loss")) == [20, 40, 51]


@pytest.mark.slow
def test_checkpoints_are_also_saved_by_time(settings, tmp_path):
    often = ("checkpoint.every_steps=1000", "checkpoint.every_minutes=0.001", "checkpoint.keep=100")
    one = train(tmp_path / "one", *settings, *often)
    assert len(steps_kept(one.folder)) > 3
    two = train(tmp_path / "two", *settings, *often, ranks=2)
    assert two.code == 0, two.output


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_on_a_full_disk_training_continues_and_saves_once_there_is_room(
    uninterrupted, settings, small_disk, tmp_path, ranks
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_050_000))
    training = Training(folder, *settings, ranks=ranks)
    training.wait_for_step(20)
    filler.unlink()
    result = training.wait()
    assert result.code == 0, result.output
    assert "checkpoint of step 7 could not be written: " in result.output
    assert "No space left on device; training continues" in result.output
    assert 51 in steps_kept(folder)
    if ranks == 1:
        assert result.digest == uninterrupted.digest


def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_done(settings, small_disk, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    (small_disk / "filler").write_bytes(bytes(2_050_000))
    result = train(folder, *settings)
    assert result.code == 1
    message = r"distrain: .*: the last checkpoint, of step 51, could not be written: free disk space"
    assert re.search(message, result.output)


def test_a_stop_that_cannot_be_saved_is_reported_by_one_rank(settings, small_disk, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(small_disk)
    (small_disk / "filler").write_bytes(bytes(2_050_000))
    training = Training(folder, *settings, "train.epochs=1000", ranks=2)
    training.wait_for_step(5)
    training.signal_workers(signal.SIGTERM)
    result = training.wait()
    assert result.code == 1
    message = r"distrain: (rank 1: )?.*: the last checkpoint, of step \d+, could not be written"
    assert re.findall(message, result.output) == [""]


def test_a_finished_run_continues_for_more_epochs_only_on_purpose(settings, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, *settings, "train.epochs=1").code == 0
    refused = train(folder, *settings)
    assert refused.code == 78
    assert "name it in run.change=[train.epochs] if the change is intended" in refused.output
    longer = train(folder, *settings, "run.change=[train.epochs]")
    assert longer.code == 0, longer.output
    assert "resuming at step 17 of 51" in longer.output
    assert list(longer.series("train/loss")) == list(range(1, 52))
    assert train(folder, *settings).code == 0  # the new length is the run's from now on
    shorter = train(folder, *settings, "train.epochs=2", "run.change=[train.epochs]")
    assert shorter.code == 78
    assert "train.epochs=2.0 ends at step 34, and this run is at step 51 already" in shorter.output


def test_a_fixed_setting_cannot_change_even_on_purpose(settings, tmp_path):
    refused = train(tmp_path / "run", *settings, "run.change=[batch.lanes]")
    assert refused.code == 78
    assert "run.change: batch.lanes cannot change during a run" in refused.output


def tool(monkeypatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["distrain", "checkpoints", *map(str, words)])
    return main()


@pytest.fixture
def run_folder(uninterrupted, tmp_path) -> Path:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(uninterrupted.folder), str(copy)], check=True)
    return copy


def test_checkpoints_are_listed_and_shown(run_folder, uninterrupted, monkeypatch, capsys):
    assert tool(monkeypatch, "list", run_folder) == 0
    listed = capsys.readouterr().out
    assert all(str(step) in listed for step in steps_kept(run_folder))
    assert "best, top-1" in listed
    assert tool(monkeypatch, "show", run_folder) == 0
    shown = capsys.readouterr().out
    assert uninterrupted.digest in shown
    assert "optimizer momentum_buffer: 29 tensors" in shown
    assert "    batch.lanes: 3" in shown


def test_verify_finds_a_damaged_checkpoint_and_sets_it_aside(run_folder, monkeypatch, capsys):
    damaged = committed(run_folder / "checkpoints")[-1]
    data = next(damaged.glob("*.distcp"))
    os.truncate(data, 100)
    assert tool(monkeypatch, "verify", run_folder) == 78
    assert f"{damaged.name}: damaged: {data.name} has " in capsys.readouterr().out
    assert tool(monkeypatch, "prune", run_folder, "--keep", "1") == 78
    assert "nothing removed: an older one may be needed" in capsys.readouterr().err
    assert tool(monkeypatch, "verify", run_folder, "--set-aside") == 78
    assert tool(monkeypatch, "verify", run_folder) == 0
    assert tool(monkeypatch, "list", run_folder) == 0
    assert f"set aside: {damaged.name}.bad: {data.name} has " in capsys.readouterr().out


def test_pruning_keeps_the_newest_and_the_best_and_has_a_dry_run(run_folder, monkeypatch, capsys):
    before = steps_kept(run_folder)
    assert tool(monkeypatch, "prune", run_folder, "--keep", "1", "--dry-run") == 0
    assert steps_kept(run_folder) == before
    assert "would remove step-000000" in capsys.readouterr().out
    assert tool(monkeypatch, "prune", run_folder, "--keep", "1") == 0
    assert steps_kept(run_folder) == sorted(
        {51, json.loads((run_folder / "checkpoints/best.json").read_text())["step"]}
    )


def test_a_folder_that_is_not_a_run_is_one_line(tmp_path, monkeypatch, capsys):
    assert tool(monkeypatch, "list", tmp_path) == 78
    assert capsys.readouterr().err == (
        f"distrain: {tmp_path}: not the folder of a run; give runs/NAME, which contains checkpoints/\n"
    )
