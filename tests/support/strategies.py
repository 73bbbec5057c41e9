"""Starts strategies_main.py: short trainings under several strategies in one process group."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.processes import environment

STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
DENSENET = ("model.name=densenet_bc_10_4",)
# Small steps: rounding that differs in the last bit grows to something else within tens of large ones.
_COMMON = ("train.precision=fp32", "optimizer.weight_decay=0.001", "optimizer.clip_norm=0.5")


@dataclass
class Outcome:
    """The outcome of a task: its results, see strategies_main.py, and the state it saved."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    state: dict[str, torch.Tensor]


def task(folder: Path, name: str, *settings: str, first: int = 0, last: int, **rest) -> dict:
    """A task for strategies_main.py that saves its state to `folder`/`name`.pt."""
    save = str(folder / f"{name}.pt")
    return {"settings": [*_COMMON, *settings], "first": first, "last": last, "save": save, **rest}


def run_tasks(tasks: list[dict], ranks: int, folder: Path) -> list[Outcome]:
    """Run tasks one after the other in one process group."""
    file = folder / f"tasks-on-{ranks}.json"
    file.write_text(json.dumps(tasks))
    program = str(Path(__file__).with_name("strategies_main.py"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.run(
        [sys.executable, *torchrun, program, str(file)], capture_output=True, text=True, env=environment(), timeout=800
    )
    assert process.returncode == 0, process.stdout + process.stderr
    results = json.loads(file.with_suffix(".results").read_text())
    return [Outcome(**result, state=torch.load(one["save"])) for one, result in zip(tasks, results, strict=True)]


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: Any) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=f"{name}: {{}}".format, **tolerance)
