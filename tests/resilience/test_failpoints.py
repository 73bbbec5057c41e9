import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import distrain
from distrain.execution.precision import Autocast
from distrain.failpoints import FAILPOINTS, arm, disarm, failpoint
from distrain.resilience.faults import Faults, InjectedError


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


def test_elsewhere_than_in_a_step_a_fault_fires_at_the_first_opportunity(tmp_path):
    with Faults(["ioerror@checkpoint.write:10"], tmp_path, rank=0):
        failpoint("checkpoint.write", 7)
        with pytest.raises(OSError, match="injected"):
            failpoint("checkpoint.write", 14)
        failpoint("checkpoint.write", 21)


def test_the_nan_fault_poisons_one_output_of_the_network(tmp_path):
    network = Autocast(nn.Linear(3, 2), "fp32")
    other = nn.Linear(3, 2)
    images = torch.ones(4, 3)
    with Faults(["nan@train.step:2"], tmp_path, rank=0):
        failpoint("train.step", 1)
        assert network(images).isfinite().all()
        failpoint("train.step", 2)
        assert other(images).isfinite().all()
        assert network(images).isnan().all()
        assert network(images).isfinite().all()
