import errno
import json
import multiprocessing
import os
import resource
from pathlib import Path

import pytest

from distrain.data.loading.quarantine import Quarantine
from distrain.errors import UserError

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "q.jsonl"


def report(path, samples, all_ready):
    quarantine = Quarantine(path, "train", 1000, 1.0)
    all_ready.wait()
    for sample in samples:
        quarantine.report(sample, "bad")


def listed(path):
    return [(entry["split"], entry["sample"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_a_sample_is_listed_once_however_many_ranks_come_upon_it(path):
    all_ready = SPAWN.Barrier(3)
    parts = (range(0, 60), range(30, 90), range(0, 90, 2))
    ranks = [SPAWN.Process(target=report, args=(path, part, all_ready)) for part in parts]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert sorted(listed(path)) == [("train", sample) for sample in range(90)]


def test_splits_are_counted_apart_and_together_with_other_ranks(path):
    ours, theirs, val = (Quarantine(path, split, 100, 1.0) for split in ("train", "train", "val"))
    ours.report(1, "bad")
    theirs.report(2, "bad")
    val.report(1, "bad")
    assert (ours.count(), theirs.count(), val.count()) == (2, 2, 1)


def test_too_many_bad_samples_end_the_run_and_name_the_list(path):
    ours, theirs = (Quarantine(path, "train", 100, 0.02) for _ in range(2))
    ours.report(1, "bad")
    ours.report(1, "bad")
    theirs.report(2, "bad")
    with pytest.raises(UserError, match=r"3 of 100 samples of data\.train .* data\.max_bad=0\.02 .*q\.jsonl"):
        ours.report(3, "bad")


def test_what_was_mended_after_an_earlier_start_counts_no_more(path):
    earlier = Quarantine(path, "train", 100, 0.02)
    for sample in (1, 2):
        earlier.report(sample, "bad")
    with pytest.raises(UserError):
        earlier.report(3, "bad")
    ours, theirs = (Quarantine(path, "train", 100, 0.02) for _ in range(2))
    ours.report(1, "still bad")
    theirs.report(50, "bad")
    assert ours.count() == theirs.count() == 2
    assert listed(path) == [("train", sample) for sample in (1, 2, 3, 1, 50)]
    with pytest.raises(UserError, match="3 of 100 samples"):
        theirs.report(3, "still bad")


def test_whatever_the_limit_not_all_samples_may_be_bad(path):
    quarantine = Quarantine(path, "val", 3, 1.0)
    quarantine.report(0, "bad")
    quarantine.report(2, "bad")
    with pytest.raises(
        UserError, match=r"^none of the 3 samples of data\.val can be used: .*q\.jsonl lists them; mend"
    ):
        quarantine.report(1, "bad")


@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_line_cut_short_by_a_kill_does_no_harm(path, opened):
    first = Quarantine(path, "train", 100, 1.0)
    first.report(1, "bad")
    with path.open("a") as file:
        file.write('{"split": "tr')
    quarantine = {"before": first, "after": Quarantine(path, "train", 100, 1.0)}[opened]
    quarantine.report(2, "bad")
    assert quarantine.count() == {"before": 2, "after": 1}[opened]
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()[::2]] == [1, 2]


def test_a_list_that_cannot_be_opened_is_one_line(path, monkeypatch):
    quarantine = Quarantine(path, "train", 100, 1.0)
    monkeypatch.setattr(Path, "open", fail_read_only)
    with pytest.raises(
        UserError, match=rf"^{path}: bad samples cannot be listed: Read-only file system; free some space"
    ):
        quarantine.report(1, "bad")


def fail_read_only(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.fixture
def small_files():
    """A process that may write no large files, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_list_that_cannot_grow_is_one_line(path, small_files):
    path.write_bytes(b"\n" * (small_files - 10))
    quarantine = Quarantine(path, "train", 100, 1.0)
    with pytest.raises(
        UserError, match=rf"^{path}: bad samples cannot be listed: File too large; .*, or set run\.dir to a"
    ):
        quarantine.report(1, "bad")
