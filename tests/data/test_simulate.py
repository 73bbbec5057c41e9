import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.__main__ import main
from distrain.data.index import Index, Shard
from distrain.data.sampling.simulate import peak_cache, simulate
from distrain.data.storage.index_file import save_index


@pytest.fixture
def shards():
    """4,000 samples of 10 bytes in 200 shards."""
    return make_shards(200, 20)


def make_shards(count, samples):
    zeros = np.zeros(count * samples, np.int32)
    return Index(
        root="/nowhere",
        shards=tuple(Shard(f"{number}.tar", 10 * samples, 0) for number in range(count)),
        classes=("a",),
        shard=np.repeat(np.arange(count), samples).astype(np.int32),
        offset=zeros.astype(np.int64),
        size=zeros + 10,
        label=zeros,
        width=zeros + 1,
        height=zeros + 1,
        crc32=zeros.astype(np.uint32),
    )


def test_a_window_shuffle_needs_fewer_downloads_and_less_cache(shards):
    window, mixed = (simulate(shards, shuffle, 4, 2, 10, 10) for shuffle in ("window", "global"))
    assert window.steps == mixed.steps == 50
    assert 50 <= window.node_shards <= 52  # a quarter of the shards, and one split at either end
    assert mixed.node_shards > 190
    assert window.node_share < 1.05 < mixed.node_share
    assert window.cache_bytes <= 2 * 2 * 14 * 200  # two lanes' windows of twelve and a half, and the next ones
    assert mixed.cache_bytes > 150 * 200
    assert window.same_shard < 0.1


@given(*(st.integers(1, limit) for limit in (9, 20, 40, 8, 40, 12)), st.sampled_from(["window", "global"]))
def test_any_cluster_can_be_simulated_with_any_data(count, samples, nodes, gpus, per_lane, window, shuffle):
    simulated = simulate(make_shards(count, samples), shuffle, nodes, gpus, per_lane, window)
    assert 1 <= simulated.node_shards <= count
    assert 10 * samples <= simulated.cache_bytes <= 10 * samples * count
    assert 1 <= simulated.node_share <= samples * count
    assert 0 <= simulated.same_shard <= 1


def test_a_shard_occupies_the_cache_from_its_first_to_its_last_read():
    read = np.array([0, 1, 0, 2], np.int32)
    steps = np.array([0, 1, 2, 3])
    assert peak_cache(read, steps, np.array([5, 7, 100])) == 100
    assert peak_cache(read[:3], steps[:3], np.array([5, 7, 100])) == 12


def test_the_command_prints_both_shuffles(shards, tmp_path, monkeypatch, capsys):
    save_index(shards, tmp_path / "i.parquet")
    monkeypatch.setattr("sys.argv", ["distrain", "shards", "simulate", f"{tmp_path}/i.parquet", "--nodes", "4"])
    assert main() == 0
    shown = capsys.readouterr().out
    assert "4,000 images in 200 shards on 4 x 8 ranks" in shown
    assert "shuffle=window" in shown
