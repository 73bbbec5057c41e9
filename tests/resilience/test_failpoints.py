import errno
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import distrain
from distrain.errors import UserError
from distrain.execution.precision import Autocast
from distrain.failpoints import FAILPOINTS, arm, disarm, failpoint
from distrain.resilience.faults import HOLD, Faults, InjectedError, parse_fault, read_fired


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    disarm()


def test_a_failpoint_does_nothing_unless_armed():
    reached = []
    failpoint("train.step", 1)
    arm(lambda name, step: reached.append((name, step)))
    failpoint("train.step", 2)
    disarm()
    failpoint("train.step", 3)
    assert reached == [("train.step", 2)]


def test_a_run_without_faults_arms_nothing(tmp_path):
    with Faults([], tmp_path, rank=0), Faults(["exception@train.step:3/1"], tmp_path, rank=0):
        failpoint("train.step", 3)
    assert not list(tmp_path.iterdir())


def test_every_failpoint_in_the_code_is_listed_and_every_listed_one_exists():
    sources = [path.read_text() for path in Path(distrain.__file__).parent.rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'\bfailpoint\("([a-z.]+)"', source)}
    assert used == set(FAILPOINTS)


def test_a_fault_fires_once_in_the_life_of_a_run(tmp_path):
    faults = ["exception@train.step:3", "exception@train.step:5/1"]
    with Faults(faults, tmp_path, rank=0):
        failpoint("train.step", 2)
        failpoint("data.request", 3)
        with pytest.raises(InjectedError):
            failpoint("train.step", 3)
        failpoint("train.step", 3)
        failpoint("train.step", 5)
    with Faults(faults, tmp_path, rank=0):  # a restart
        failpoint("train.step", 3)
    (record,) = (tmp_path / "faults.jsonl").read_text().splitlines()
    assert json.loads(record)["fault"] == "exception@train.step:3/0"


@pytest.mark.parametrize("name", ["train.step", "data.request", "checkpoint.write"])
def test_a_fault_fires_at_the_first_opportunity_from_its_step_on(tmp_path, name):
    with Faults([f"ioerror@{name}:10"], tmp_path, rank=0):
        failpoint(name, 7)
        with pytest.raises(OSError, match="injected"):
            failpoint(name, 14)
        failpoint(name, 21)


def test_a_fault_at_any_time_fires_after_its_step_has_begun(tmp_path):
    (tmp_path / "file").write_text("content")
    fault = "eio@time:3+0.05/1"
    with Faults([fault], tmp_path, rank=1):
        failpoint("train.step", 2)
        failpoint("data.request", 4)
        time.sleep(0.2)
        assert not (tmp_path / "faults.jsonl").exists()
        failpoint("train.step", 4)
        deadline = time.monotonic() + 100
        while fault not in read_fired(tmp_path):
            assert time.monotonic() < deadline
    assert (tmp_path / "file").read_text() == "content"


def test_a_fault_of_the_file_system_lasts_for_a_while_and_spares_other_folders(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("content")
    with Faults(["enospc@train.step:1"], run, rank=0):
        (run / "before").write_text("content")
        failpoint("train.step", 1)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            (run / "full").write_text("content")
        assert other.write_text("content") == 7
        assert (run / "before").read_text() == "content"
        deadline = time.monotonic() + 100
        while (run / "full").read_text() != "content":
            assert time.monotonic() < deadline
            with suppress(OSError):
                (run / "full").write_text("content")


def test_a_step_of_the_clock_is_seen_by_this_process_until_the_faults_end(tmp_path):
    began = time.time()
    with Faults(["clock@train.step:1"], tmp_path, rank=0):
        failpoint("train.step", 1)
        shifted = time.time()
        assert abs(shifted - began) > 2
        assert abs(time.time_ns() / 1e9 - shifted) < 2
    assert 0 <= time.time() - began < min(3600, abs(shifted - began) + 3600)


def test_nothing_fires_while_faults_are_held_and_all_of_it_does_later(tmp_path, monkeypatch):
    monkeypatch.setattr("distrain.resilience.faults._HELD_STEP_S", 0.0)
    (tmp_path / HOLD).touch()
    with Faults(["exception@train.step:3", "ioerror@data.request:3"], tmp_path, rank=0):
        for step in (3, 4):
            failpoint("train.step", step)
            failpoint("data.request", step)
        (tmp_path / HOLD).unlink()
        with pytest.raises(InjectedError):
            failpoint("train.step", 5)
        with pytest.raises(OSError, match="injected"):
            failpoint("data.request", 9)


@pytest.mark.parametrize("text", ["eio@time:12+0.35/1", "sigkill@time:3+2/0", "eio@checkpoint.write:7/1"])
def test_a_fault_reads_as_it_is_written(text):
    assert str(parse_fault(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eio@time:12/1", "+SECONDS follows the step of time, and only of that"),
        ("eio@train.step:12+1/1", "+SECONDS follows the step of time, and only of that"),
        ("exception@time:12+1", "at any time only sigkill,"),
    ],
)
def test_a_time_that_does_not_fit_is_one_line(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_fault(text)


def test_the_nan_fault_poisons_one_output_of_the_network(tmp_path):
    network = Autocast(nn.Linear(3, 2), "fp32", torch.contiguous_format)
    other = nn.Linear(3, 2)
    images = torch.ones(4, 3)
    with Faults(["nan@train.step:2"], tmp_path, rank=0):
        failpoint("train.step", 1)
        assert network(images).isfinite().all()
        failpoint("train.step", 2)
        assert other(images).isfinite().all()
        assert network(images).isnan().all()
        assert network(images).isfinite().all()
