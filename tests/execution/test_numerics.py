"""What decides how operations are computed is set before anything is computed or exchanged."""

import os
import subprocess
import sys

import pytest
import torch
from support.processes import SMALL, environment

from distrain.config import TrainConfig
from distrain.execution.numerics import configure_numerics

PROBE = """
import sys, torch, torch.distributed as dist
from distrain import config
from distrain.train import train

def report(*args, **kwargs):
    import os
    print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, end=" ")
    print(os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.utils.deterministic.fill_uninitialized_memory)
    sys.exit()

dist.init_process_group = report
train(config.load(None, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("deterministic", "expected"), [("true", "True False :4096:8 False"), ("false", "False True None False")]
)
def test_numerics_are_set_before_the_process_group_which_chooses_algorithms_by_them(
    deterministic, expected, on_dataset, tmp_path
):
    settings = (*SMALL, *on_dataset, f"train.deterministic={deterministic}", f"run.dir={tmp_path}", "run.name=run")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *settings], capture_output=True, text=True, env=environment(), timeout=400
    )
    assert done.stdout.strip() == expected, done.stderr


def test_a_workspace_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        configure_numerics(TrainConfig(deterministic=True))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        configure_numerics(TrainConfig())
    assert not torch.are_deterministic_algorithms_enabled()
