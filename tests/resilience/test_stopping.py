import errno
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.processes import SMALL, Training, train

from distrain.resilience.claim import newest_attempt
from distrain.resilience.file_calls import Disturbance, FileCalls
from distrain.resilience.stopping import StopRequest

# With everything that draws random numbers in a forward pass.
NETWORK = (
    "model.name=regnet",
    "model.options={depth: 3, w0: 16, wa: 8, wm: 2, group_width: 8, stem: cifar, drop_path: 0.3, head_dropout: 0.3}",
)
SHORT = (*SMALL, *NETWORK, "batch.lanes=2", "batch.per_lane=4", "train.epochs=3", "checkpoint.every_steps=1000")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_sets_the_flag_and_is_named(tmp_path, number):
    with StopRequest(tmp_path) as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.reason == number.name


def test_a_stop_file_that_cannot_be_looked_for_just_now_is_found_later(tmp_path):
    with StopRequest(tmp_path) as stop, FileCalls(tmp_path) as files:
        (tmp_path / "stop").touch()
        files.disturb(Disturbance(("stat",), errno.EIO, 1.0))
        assert not stop
        deadline = time.monotonic() + 100
        while not stop:
            assert time.monotonic() < deadline


def test_a_stop_file_that_cannot_be_removed_does_not_hide_that_everything_is_saved(tmp_path, caplog):
    with StopRequest(tmp_path) as stop, FileCalls(tmp_path) as files:
        (tmp_path / "stop").touch()
        files.disturb(Disturbance(("unlink",), errno.EIO, 1000.0))
        stop.clear_file()
        assert f"{tmp_path / 'stop'} cannot be removed: " in caplog.text


def test_control_c_twice_exits_at_once(tmp_path):
    program = (
        "import os, pathlib, signal, time\n"
        "from distrain.resilience.stopping import StopRequest\n"
        "with StopRequest(pathlib.Path('.')) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=200, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGINT


def test_control_c_saves_and_stops_a_run(on_dataset, tmp_path):
    settings = (*SHORT, *on_dataset)
    training = Training(tmp_path / "run", *settings)
    training.wait_for_step(5)
    training.signal_workers(signal.SIGINT)
    stopped = training.wait()
    assert stopped.code == 75, stopped.output
    assert "stopped by SIGINT; everything is saved" in stopped.output
    assert train(tmp_path / "run", *settings).digest == train(tmp_path / "other", *settings).digest


def test_a_signal_during_validation_stops_it(on_dataset, tmp_path):
    validation = ("train.epochs=1", "evaluate.batch=2", "resilience.faults=[sigterm@evaluate.batch:25]")
    stopped = train(tmp_path / "run", *SHORT, *on_dataset, *validation)
    assert stopped.code == 75, stopped.output
    assert max(stopped.series("train/loss")) == 25
    assert stopped.series("val/loss") == {}


def test_a_time_budget_is_in_minutes(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequest(tmp_path, minutes=2)
    now += 119
    assert not stop
    now += 2
    assert stop
    assert stop.reason == "train.max_minutes=2"


@pytest.mark.slow
def test_a_time_budget_saves_and_stops_and_applies_to_every_start(on_dataset, tmp_path):
    settings = (*SHORT, *on_dataset, "train.epochs=200", "train.max_minutes=0.1", "evaluate.every_epochs=300")
    first = train(tmp_path / "run", *settings, ranks=2)
    assert "stopped by train.max_minutes=0.1; everything is saved" in first.output
    done = max(first.series("train/loss"))
    second = train(tmp_path / "run", *settings)
    assert second.code == 75, second.output
    steps = list(second.series("train/loss"))
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > done


def test_a_run_that_stops_after_some_epochs_continues_to_the_same_bits(on_dataset, tmp_path):
    settings = (*SHORT, *on_dataset, "evaluate.every_epochs=3")
    whole = train(tmp_path / "whole", *settings, ranks=2)
    first = train(tmp_path / "run", *settings, "train.stop_epoch=1", ranks=2)
    assert first.code == 75, first.output
    assert "stopped by train.stop_epoch=1; everything is saved" in first.output
    assert list(first.series("train/loss")) == list(range(1, 26))
    assert list(first.series("val/loss")) == [25]
    again = train(tmp_path / "run", *settings, "train.stop_epoch=1", ranks=2)
    assert again.code == 75, again.output
    assert list(again.series("train/loss")) == list(range(1, 26))
    rest = train(tmp_path / "run", *settings, ranks=2)
    assert rest.digest == whole.digest


def test_a_stop_file_under_torchrun_ends_the_job_though_it_may_restart(on_dataset, tmp_path):
    rendezvous = ("--standalone", "--max-restarts", "3")
    settings = (*SHORT, *on_dataset, "train.epochs=1000", "evaluate.every_epochs=1000")
    training = Training(tmp_path / "run", *settings, ranks=2, rendezvous=rendezvous)
    training.wait_for_step(3)
    (tmp_path / "run" / "stop").touch()
    stopped = training.wait()
    assert stopped.output.count("stopped by file") == 1, stopped.output
    assert newest_attempt(tmp_path / "run").number == 1


def test_control_c_twice_ends_a_rank_that_waits_for_another_one(on_dataset, tmp_path):
    settings = (*SHORT, *on_dataset, "train.epochs=1000", "evaluate.every_epochs=1000", "resilience.patience=600")
    training = Training(tmp_path / "run", *settings, ranks=2)
    training.wait_for_step(3)
    frozen, waiting = training.workers()
    frozen.suspend()
    for _ in range(2):
        time.sleep(1)  # to wait in an exchange, where Python handles no signal
        waiting.send_signal(signal.SIGINT)
    psutil.wait_procs([waiting], timeout=20)
    assert not waiting.is_running() or waiting.status() == psutil.STATUS_ZOMBIE
    training.kill()
