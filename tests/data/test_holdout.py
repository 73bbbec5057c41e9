"""A validation split is made of a training folder."""

import numpy as np
import pytest
from support.images import encoded

from distrain.__main__ import main
from distrain.data.shards.holdout import hold_out
from distrain.data.shards.sources import find
from distrain.data.storage.index_file import load_index


def write_images(folder, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{name}-{number}.jpg").write_bytes(encoded(number, size=(9, 8)))


def build(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["distrain", "shards", "build", *map(str, arguments)])
    return main()


def test_every_class_is_split_by_the_fraction_and_no_image_is_in_both(tmp_path, monkeypatch):
    write_images(tmp_path / "images", cat=20, dog=7, cow=2, emu=1)
    assert build(monkeypatch, tmp_path / "images", "--out", tmp_path / "out", "--val-fraction", 0.2) == 0
    train, val = (load_index(f"{tmp_path}/out/{split}.parquet") for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "cow", "dog", "emu")
    assert np.bincount(val.label, minlength=4).tolist() == [4, 1, 1, 0]
    assert np.bincount(train.label, minlength=4).tolist() == [16, 1, 6, 1]


def test_the_split_is_stable(tmp_path):
    write_images(tmp_path / "a", cat=30, dog=30)
    write_images(tmp_path / "b", cat=31, dog=30)
    held = [set(hold_out(find(tmp_path / name, "train"), 0.2)[1].names) for name in ("a", "b")]
    train, val = hold_out(find(tmp_path / "a", "train"), 0.2)
    assert sorted(train.names + val.names) == sorted(find(tmp_path / "a", "train").names)
    assert len(held[0] - held[1]) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val-fraction", "1.5"], "'1.5' is not a number between 0 and 1"),
        (["--val-fraction", "x"], "'x' is not a number between 0 and 1"),
        (["--val-fraction", "0.5", "--split", "val"], "--val-fraction makes both splits"),
        (["--val-fraction", "0.5"], "no class has two images"),
    ],
)
def test_a_split_that_cannot_be_made_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", cat=1, dog=1)
    try:
        code = build(monkeypatch, tmp_path / "images", "--out", tmp_path / "out", *arguments)
    except SystemExit as error:
        code = error.code
    assert code in (2, 78)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
