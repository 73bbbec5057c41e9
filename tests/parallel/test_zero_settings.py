"""What DeepSpeed is told on a GPU, which is simulated by its name."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.execution import settings
from support.processes import environment

from distrain.parallel.zero import Zero, import_deepspeed


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_gradients_are_exchanged_during_the_backward_pass_on_a_simulated_gpu(strategy, tmp_path):
    zero = Zero.__new__(Zero)
    zero._stage, zero._micro_batches = 2, 1
    zero._group = SimpleNamespace(device=torch.device("cuda"))
    told = zero._settings(settings(tmp_path, f"parallel.strategy={strategy}"))
    assert told["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_operations_that_a_simulated_gpu_does_not_need_are_not_probed(device, monkeypatch):
    class Table(dict):
        """DeepSpeed's table of operations, which tries to compile all of them when it is touched."""

        touched = False

        def __setitem__(self, name, value):
            self.touched = True

    table = Table()
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(ops=SimpleNamespace(__compatible_ops__=table)))
    import_deepspeed(torch.device(device))
    assert table.touched == (device == "cpu")


def test_a_start_imports_neither_mlflow_nor_the_compiler_of_torch():
    """As DeepSpeed does, for parts of it that are not used: it takes seconds."""
    program = """
import sys
from support.strategies import DENSENET, STRATEGIES
from support.strategies_main import run_task
from distrain.parallel.group import Group

with Group() as group:
    for strategy in STRATEGIES:
        settings = (f"parallel.strategy={strategy}", *DENSENET, "batch.lanes=1", "batch.per_lane=2")
        run_task({"settings": settings, "first": 0, "last": 1}, group)
assert "deepspeed" in sys.modules
print([name for name in ("mlflow", "torch._inductor.compile_fx") if name in sys.modules])
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
