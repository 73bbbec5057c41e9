"""What DeepSpeed is told: about fused blocks, and on a GPU, which is simulated by its name."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support.execution import settings

from distrain.models import build
from distrain.models.fusion import set_fused
from distrain.parallel.zero import Zero, _gather_fused_blocks_whole, import_deepspeed


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


def test_the_weights_of_fused_blocks_are_gathered_at_once():
    import_deepspeed(torch.device("cpu"))
    from deepspeed.utils import get_z3_leaf_modules

    network = build("densenet_bc_10_4", 5)
    _gather_fused_blocks_whole(network)
    assert get_z3_leaf_modules(network) == []
    set_fused(network, is_fused=True)
    _gather_fused_blocks_whole(network)
    assert set(get_z3_leaf_modules(network)) == {*network.blocks, *network.transitions}
