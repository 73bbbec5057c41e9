"""Which GPU a rank gets, and what is said where it cannot have one. Without a GPU, torch.cuda is replaced."""

import os
from types import SimpleNamespace

import pytest
import torch

from distrain.errors import TemporaryError, UserError
from distrain.parallel import gpu
from distrain.parallel.gpu import open_device
from distrain.parallel.group import Group
from distrain.parallel.nodes import Peer, require_own_gpus
from launch.cli import simulated_hosts
from launch.node_env import count_ranks, visible_gpus


@pytest.fixture
def simulated_gpus(monkeypatch):
    """Two GPUs of NUMA node 0, of which nothing but their number and their place is there."""
    chosen = []
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0, uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: place)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    return chosen


def test_a_rank_gets_the_simulated_gpu_of_its_local_rank(simulated_gpus):
    assert open_device(1, 2) == torch.device("cuda", 1)
    assert simulated_gpus == [torch.device("cuda", 1)]


@pytest.mark.parametrize(("local_rank", "local_world"), [(0, 3), (2, 3), (2, 1)])
def test_more_ranks_than_simulated_gpus_are_one_line_with_the_cure(simulated_gpus, local_rank, local_world):
    expected = r"^3 ranks on a host with 2 GPUs: start one rank per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= "
    with pytest.raises(UserError, match=expected) as error:
        open_device(local_rank, local_world)
    assert error.value.scope == "all"  # or every rank would print it
    assert simulated_gpus == []


def test_a_simulated_gpu_that_fails_is_one_line_and_the_attempt_may_be_repeated(simulated_gpus, monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "set_device", fail)
    with pytest.raises(TemporaryError) as error:
        open_device(1, 2)
    assert str(error.value) == "GPU 1 of this host does not work: CUDA error: uncorrectable ECC error encountered"


def test_gpus_that_torch_cannot_use_are_not_replaced_by_the_cpu(monkeypatch, tmp_path):
    (tmp_path / "0000:1b:00.0").mkdir()
    monkeypatch.setattr(gpu, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(
        UserError, match=r"this host has NVIDIA GPUs that torch .* cannot use: install a build of torch"
    ):
        open_device(0, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert open_device(0, 1) == torch.device("cpu")


def test_a_rank_is_bound_to_the_cores_beside_its_simulated_gpu(simulated_gpus, monkeypatch, tmp_path):
    (tmp_path / "0000:1b:00.0").mkdir()
    (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text("0-15,32,64-65\n")
    bound = []
    monkeypatch.setattr(gpu, "_PCI_DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3, 16, 32, 64, 99})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: bound.append(cores))
    open_device(0, 2)
    assert bound == [{2, 3, 32, 64}]
    (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text("100-103\n")  # none that the scheduler allows
    open_device(0, 2)
    (tmp_path / "0000:1b:00.0" / "local_cpulist").unlink()
    open_device(0, 2)
    assert len(bound) == 1


def peer(rank: int, host: str, uuid: str) -> Peer:
    return Peer(rank, host, host, 1, 1, uuid)


def test_two_ranks_on_one_gpu_and_ranks_without_one_are_found(monkeypatch):
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    require_own_gpus([peer(0, "a", "GPU-1"), peer(1, "a", "GPU-2"), peer(0, "b", "GPU-3")])
    require_own_gpus([peer(0, "a", ""), peer(1, "a", "")])
    shared = [peer(0, "a", "GPU-1"), peer(0, "b", "GPU-2"), peer(0, "b", "GPU-2")]
    with pytest.raises(UserError, match="ranks 1 and 2 use the same GPU of b, which NCCL refuses: start one rank per"):
        require_own_gpus(shared)
    with pytest.raises(UserError, match="rank 1 on b has no GPU and others have one: exclude that host, or hide the"):
        require_own_gpus([peer(0, "a", "GPU-1"), peer(0, "b", "")])
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    require_own_gpus(shared)


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks"), [("0,2,5", ["0", "2", "5"], 3), ("", [], 1), ("-1", [], 1), ("3, -1,4", ["3"], 1)]
)
def test_ranks_are_counted_by_the_gpus_that_are_visible(monkeypatch, visible, gpus, ranks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (visible_gpus(), count_ranks()) == (gpus, ranks)


def test_simulated_nodes_share_the_gpus_of_the_machine(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,4,5")
    assert [host.variables["CUDA_VISIBLE_DEVICES"] for host in simulated_hosts(2, None)] == ["0,1", "4,5"]
    assert [host.variables["CUDA_VISIBLE_DEVICES"] for host in simulated_hosts(3, 1)] == ["0", "1", "4"]
    for nodes, ranks in ((2, 3), (5, None)):
        with pytest.raises(UserError, match=f"^{nodes * (ranks or 1)} ranks need as many GPUs, and this machine has 4"):
            simulated_hosts(nodes, ranks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in simulated_hosts(2, 3)[0].variables


def test_after_an_error_nothing_waits_for_the_simulated_gpus_of_other_ranks(monkeypatch):
    calls = []
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append("destroyed"))
    for device, error in (("cuda", ValueError()), ("cuda", None), ("cpu", ValueError())):
        calls.append(device)
        Group(device=torch.device(device)).__exit__(error and type(error), error, None)
    assert calls == ["cuda", "cuda", "destroyed", "cpu", "destroyed"]
