import errno
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from support.synthetic import write_split

from distrain.data.storage.index_file import load_index
from distrain.data.storage.store import DataError, LocalStore
from distrain.errors import TemporaryError, UserError


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return copytree(dataset, tmp_path / "copy")


@pytest.fixture
def few_files():
    """Limits the number of open files of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def read_directly(built, sample):
    content = Path(built.location(built.shard[sample])).read_bytes()
    return content[built.offset[sample] : built.offset[sample] + built.size[sample]]


def test_every_sample_has_the_indexed_bytes(dataset):
    built = load_index(f"{dataset}/train.parquet")
    store = LocalStore(built)
    assert [store.read(sample) for sample in range(203)] == [read_directly(built, sample) for sample in range(203)]


def test_threads_read_more_shards_than_files_may_be_open(few_files, tmp_path):
    write_split(tmp_path, "train", 400, shards=200, size=2)
    built = load_index(f"{tmp_path}/train.parquet")
    store = LocalStore(built)
    samples = np.random.default_rng(0).permutation(np.tile(np.arange(400), 5)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(store.read, samples))) == 2000


def test_a_missing_shard_is_named_at_the_start(copy):
    (copy / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar: shard cannot be opened: No such file .*; restore it"):
        LocalStore(load_index(f"{copy}/train.parquet"))


def test_a_shard_of_another_size_is_named_at_the_start(copy):
    with (copy / "train-000002.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(UserError, match=r"train-000002\.tar: shard has 700 bytes, [\d,]+ when it was indexed"):
        LocalStore(load_index(f"{copy}/train.parquet"))


def test_a_shard_that_disappears_during_the_run_is_named(copy):
    store = LocalStore(load_index(f"{copy}/train.parquet"))
    (copy / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar: shard cannot be opened"):
        store.read(0)


def test_a_damaged_sample_is_an_error_that_leaves_the_others_readable(copy):
    built = load_index(f"{copy}/train.parquet")
    with (copy / "train-000000.tar").open("r+b") as file:
        file.seek(built.offset[3] + 20)
        file.write(b"\0\1\2\3")
    store = LocalStore(built)
    with pytest.raises(DataError, match=r"train-000000\.tar: the \d+ bytes at offset \d+ do not match the index"):
        store.read(3)
    assert store.read(4) == read_directly(built, 4)


def test_a_shard_replaced_by_another_of_its_size_is_named(copy):
    built = load_index(f"{copy}/train.parquet")
    store = LocalStore(built)
    shard = copy / "train-000001.tar"
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    with pytest.raises(UserError, match=rf"^{shard}: content differs from the index; restore the original shard or"):
        store.read(50)
    assert store.read(3) == read_directly(built, 3)


def test_a_shard_with_many_damaged_samples_is_still_read(copy):
    """Only 20 of its 41 samples are damaged, not the majority."""
    built = load_index(f"{copy}/train.parquet")
    with (copy / "train-000000.tar").open("r+b") as file:
        for sample in range(20):
            file.seek(built.offset[sample] + 20)
            file.write(b"\0\1\2\3")
    store = LocalStore(built)
    for sample in range(20):
        with pytest.raises(DataError):
            store.read(sample)
    assert [store.read(sample) for sample in range(20, 41)] == [read_directly(built, n) for n in range(20, 41)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_one_line_that_names_the_shard(copy, monkeypatch, number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(TemporaryError, match=rf"^{copy}/train-000000\.tar: shard cannot be read: .*; check its disk"):
        LocalStore(load_index(f"{copy}/train.parquet")).read(3)
