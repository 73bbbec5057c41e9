"""What the threads of a loader are set to before their first batch."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from distrain.data.loading.dali import DaliLoader
from distrain.data.loading.setup import make_loader, make_quarantine
from distrain.data.loading.threads import open_pool


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_loaders_threads_have_one_thread_each_and_others_keep_theirs(three_threads):
    with open_pool(2, "decode", torch.device("cpu")) as pool:
        assert [pool.submit(torch.get_num_threads).result() for _ in range(2)] == [1, 1]
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.parametrize(("name", "pools"), [("torch", ["_pool"]), ("dali", ["_read_pool", "_run_pool"])])
def test_every_thread_of_a_loader_is_set_to_a_fake_gpu(configure, train_index, monkeypatch, name, pools):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(DaliLoader, "_build_pipeline", lambda self: None)
    gpu = torch.device("cuda", 5)
    run = configure()
    with closing(make_loader(run, name, train_index, make_quarantine(run, train_index, "train"), gpu)) as loader:
        for pool in pools:
            before = len(chosen)
            getattr(loader, pool).submit(int).result()
            assert chosen[before:] == [gpu]
