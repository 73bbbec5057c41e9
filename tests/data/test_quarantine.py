import json
from concurrent.futures import ProcessPoolExecutor

import pytest

from distrain.data.quarantine import Quarantine
from distrain.errors import RankError


def report(path, samples):
    quarantine = Quarantine(path, "train", 1000, 1.0)
    for sample in samples:
        quarantine.report(sample, "bad")


def listed(path):
    return [(entry["split"], entry["sample"]) for entry in map(json.loads, path.read_text().splitlines())]


def test_a_sample_is_listed_once_however_many_ranks_come_upon_it(tmp_path):
    path = tmp_path / "q.jsonl"
    with ProcessPoolExecutor(3) as pool:
        list(pool.map(report, [path] * 3, [range(0, 60), range(30, 90), range(0, 90, 2)]))
    assert sorted(listed(path)) == [("train", sample) for sample in range(90)]


def test_splits_are_counted_apart_and_together_with_other_ranks(tmp_path):
    path = tmp_path / "q.jsonl"
    ours, theirs, val = (Quarantine(path, split, 100, 1.0) for split in ("train", "train", "val"))
    ours.report(1, "bad")
    theirs.report(2, "bad")
    val.report(1, "bad")
    assert (ours.count(), theirs.count(), val.count()) == (2, 2, 1)
    assert Quarantine(path, "train", 100, 1.0).count() == 2


def test_too_many_bad_samples_end_the_run_and_name_the_list(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", "train", 100, 0.02)
    quarantine.report(1, "bad")
    quarantine.report(1, "bad")
    quarantine.report(2, "bad")
    with pytest.raises(RankError, match=r"3 of 100 samples of data\.train .* data\.max_bad=0\.02 .*q\.jsonl"):
        quarantine.report(3, "bad")


def test_a_line_cut_short_by_a_kill_does_no_harm(tmp_path):
    path = tmp_path / "q.jsonl"
    Quarantine(path, "train", 100, 1.0).report(1, "bad")
    with path.open("a") as file:
        file.write('{"split": "tr')
    quarantine = Quarantine(path, "train", 100, 1.0)
    quarantine.report(2, "bad")
    assert Quarantine(path, "train", 100, 1.0).count() == quarantine.count() == 2
