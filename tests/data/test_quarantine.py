import errno
import fcntl
import json
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from distrain.data.loading.quarantine import Quarantine
from distrain.errors import TemporaryError, UserError
from distrain.resilience.file_calls import Disturbance, FileCalls

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "q.jsonl"


def add_all(path, samples, all_ready):
    quarantine = Quarantine(path, "train", 1000, 1.0)
    all_ready.wait()
    for sample in samples:
        quarantine.add(sample, "bad")


def listed(path):
    return [(entry["split"], entry["sample"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_a_sample_that_several_ranks_find_is_listed_once(path):
    all_ready = SPAWN.Barrier(3)
    found = (range(0, 60), range(30, 90), range(0, 90, 2))
    ranks = [SPAWN.Process(target=add_all, args=(path, samples, all_ready)) for samples in found]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(listed(path)) == [("train", sample) for sample in range(90)]


def test_a_sample_that_another_rank_lists_just_before_is_not_listed_again(path, monkeypatch):
    quarantine, other = (Quarantine(path, "train", 100, 1.0) for _ in range(2))

    def lock(file, operation):
        monkeypatch.undo()
        assert operation == fcntl.LOCK_EX
        other.add(1, "found first")

    monkeypatch.setattr(fcntl, "flock", lock)
    quarantine.add(1, "found too late")
    assert [json.loads(line)["reason"] for line in path.read_text().splitlines()] == ["found first"]


def test_each_split_is_counted_over_all_ranks(path):
    rank0, rank1, val = (Quarantine(path, split, 100, 1.0) for split in ("train", "train", "val"))
    rank0.add(1, "bad")
    rank1.add(2, "bad")
    val.add(1, "bad")
    assert (rank0.count(), rank1.count(), val.count()) == (2, 2, 1)


def test_too_many_bad_samples_are_one_line_that_names_the_list(path):
    rank0, rank1 = (Quarantine(path, "train", 100, 0.02) for _ in range(2))
    rank0.add(1, "bad")
    rank0.add(1, "bad")
    rank1.add(2, "bad")
    with pytest.raises(UserError, match=r"3 of 100 samples of data\.train .* data\.max_bad=0\.02 .*q\.jsonl"):
        rank0.add(3, "bad")


def test_samples_fixed_since_an_earlier_start_do_not_count(path):
    earlier = Quarantine(path, "train", 100, 0.02)
    for sample in (1, 2):
        earlier.add(sample, "bad")
    with pytest.raises(UserError):
        earlier.add(3, "bad")
    rank0, rank1 = (Quarantine(path, "train", 100, 0.02) for _ in range(2))
    rank0.add(1, "still bad")
    rank1.add(50, "bad")
    assert rank0.count() == rank1.count() == 2
    assert listed(path) == [("train", sample) for sample in (1, 2, 3, 1, 50)]
    with pytest.raises(UserError, match="3 of 100 samples"):
        rank1.add(3, "still bad")


def test_at_least_one_sample_must_be_good_even_with_a_limit_of_one(path):
    quarantine = Quarantine(path, "val", 3, 1.0)
    quarantine.add(0, "bad")
    quarantine.add(2, "bad")
    with pytest.raises(UserError, match=r"^none of the 3 samples of data\.val can be used: .*q\.jsonl lists them; fix"):
        quarantine.add(1, "bad")


@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_line_truncated_by_a_kill_is_ignored(path, opened):
    first = Quarantine(path, "train", 100, 1.0)
    first.add(1, "bad")
    with path.open("a") as file:
        file.write('{"split": "tr')
    quarantine = {"before": first, "after": Quarantine(path, "train", 100, 1.0)}[opened]
    quarantine.add(2, "bad")
    assert quarantine.count() == {"before": 2, "after": 1}[opened]
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()[::2]] == [1, 2]


def test_a_list_that_cannot_be_opened_is_one_line(path, monkeypatch):
    quarantine = Quarantine(path, "train", 100, 1.0)
    monkeypatch.setattr(Path, "open", fail_read_only)
    with pytest.raises(UserError, match=rf"^{path}: cannot record bad samples: Read-only file system; free disk space"):
        quarantine.add(1, "bad")


def test_a_file_system_that_fails_for_a_moment_is_no_mistake_and_does_not_end_training(path):
    quarantine = Quarantine(path, "train", 100, 1.0)
    quarantine.add(1, "bad")
    with FileCalls(path.parent) as files:
        files.disturb(Disturbance(("open", "read", "stat"), errno.EIO, 1000.0))
        assert quarantine.count() == 1
        with pytest.raises(TemporaryError, match=rf"^{path}: cannot record bad samples: .*, and run again$"):
            quarantine.add(2, "bad")
    quarantine.add(2, "bad")
    assert quarantine.count() == 2


def fail_read_only(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.fixture
def small_files():
    """Limit the file size, to simulate a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_list_that_cannot_grow_is_one_line(path, small_files):
    path.write_bytes(b"\n" * (small_files - 10))
    quarantine = Quarantine(path, "train", 100, 1.0)
    with pytest.raises(
        UserError, match=rf"^{path}: cannot record bad samples: File too large; .*, or set run\.dir to a"
    ):
        quarantine.add(1, "bad")


def test_a_password_in_a_shards_url_is_not_listed(path):
    Quarantine(path, "train", 100, 1.0).add(1, "http://ada:hunter42@host/a.tar at 512: bad")
    assert json.loads(path.read_text())["reason"] == "http://***@host/a.tar at 512: bad"
