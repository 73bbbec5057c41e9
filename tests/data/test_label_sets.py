"""Data with any number of labels per image."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.images import encoded, write_tar

from distrain.__main__ import main
from distrain.data.index import pad_labels
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.data.shards.holdout import hold_out
from distrain.data.shards.scan import scan
from distrain.data.shards.source_images import SourceImages
from distrain.data.shards.sources import find
from distrain.data.storage.index_file import load_index, save_index
from distrain.errors import UserError

LIST = "path,labels\n0.jpg,dog;outdoor\n1.jpg,\n2.jpg,cat\n3.jpg,outdoor; cat;dog\n"
SETS = [["dog", "outdoor"], [], ["cat"], ["cat", "dog", "outdoor"]]


def distrain(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["distrain", "shards", *map(str, arguments)])
    return main()


def sets_of(index):
    return [[index.classes[label] for label in row if label >= 0] for row in index.label.tolist()]


@pytest.fixture
def listing(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))

    def write(text, name="list.csv"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
def test_a_list_becomes_shards_whose_index_holds_the_sets(name, listing, tmp_path, monkeypatch, capsys):
    path = listing(LIST.replace(",", "\t") if name.endswith("tsv") else LIST, name)
    out = tmp_path / "out"
    arguments = ("build", path, "--out", out, "--multi-label")
    assert distrain(monkeypatch, *arguments) == 0
    index = load_index(f"{out}/train.parquet")
    assert index.multi_label
    assert sorted(sets_of(index)) == sorted(SETS)
    assert index.class_counts().tolist() == [2, 2, 2]
    assert "3 classes (1.5 labels per image)" in capsys.readouterr().out
    assert distrain(monkeypatch, *arguments) == 0
    assert "(1 reused)" in capsys.readouterr().out
    (out / "classes.txt").write_text("cat\ndog\noutdoor\n")
    shards = ("index", out / "train-000000.tar", "--classes", out / "classes.txt", "--out", out / "again.parquet")
    assert distrain(monkeypatch, *shards, "--multi-label") == 0
    assert load_index(f"{out}/again.parquet").digest == index.digest
    assert distrain(monkeypatch, "show", out / "train.parquet", "--sheet", tmp_path / "sheet.png") == 0
    assert "labels per image: 0 to 3, mean 1.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0.jpg,dog;;cat\n", "line 2 has an empty label in its list; delete it"),
        ("path,label\n0.jpg,dog;cat;dog\n", "line 2 has label 'dog' more than once"),
        ("path,label\n0.jpg,dog;7\n1.jpg,3 4\n", "labels are taken as names"),
        ("path,labels\n0.jpg\n", "line 2 needs a path and a label"),
        ("path,labels\n0.jpg,\n", "no image has a label"),
        ("path,labels\n0.jpg,dog;cat\n0.jpg,cat\n", "line 3 has label cat for 0.jpg, but line 2 has label dog;cat"),
    ],
)
def test_a_doubtful_set_is_one_line(text, message, listing):
    lines = []
    try:
        find(listing(text), "train", multi_label=True, info=lines.append)
    except UserError as error:
        lines.append(str(error))
    assert message in lines[0]


def test_without_the_flag_a_set_is_pointed_at(listing):
    with pytest.raises(UserError, match=r"label is missing; .*pass --multi-label to read labels"):
        find(listing(LIST), "train")
    lines = []
    find(listing("path,label\n0.jpg,dog;cat\n"), "train", info=lines.append)
    assert "line 2 has label 'dog;cat', which is one class; pass --multi-label if it lists several" in lines[0]


def scanned(folder, *labels, multi_label=True, classes=None):
    members = [
        member
        for number, (suffix, content) in enumerate(labels)
        for member in ((f"{number}.jpg", encoded(number)), (f"{number}.{suffix}", content))
    ]
    write_tar(folder / "a.tar", members)
    return scan(str(folder), ["a.tar"], classes, multi_label=multi_label)


def test_sets_are_read_from_json_and_text(tmp_path):
    index = scanned(
        tmp_path,
        *(("cls", text) for text in (b"3 1\n", b"0,2", b"", b"2")),
        *(("json", json.dumps(content).encode()) for content in ({"label": [1, 0]}, {"labels": []}, {"label": 3})),
    )
    assert sets_of(index) == [["1", "3"], ["0", "2"], [], ["2"], ["0", "1"], [], ["3"]]
    assert index.targets([0, 2]).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    named = scanned(tmp_path, ("cls", b"sea;big dog"), ("json", b'{"labels": ["big dog"]}'), classes=["big dog", "sea"])
    assert sets_of(named) == [["big dog", "sea"], ["big dog"]]


@pytest.mark.parametrize(
    ("suffix", "content", "multi_label", "message"),
    [
        (
            "cls",
            b"3 1",
            False,
            "sample 0 has label '3 1', which is not a number .*; pass --multi-label if images have several",
        ),
        ("json", b'{"label": [3]}', False, r"sample 0 has label \['3'\], .*; pass --multi-label"),
        ("json", b'{"label": [1, 0, 0]}', True, "sample 0 has label '0' more than once"),
        ("json", b'{"label": [1, 0.5]}', True, "neither an integer nor text"),
        ("cls", b"dog", True, "sample 0 has label 'dog', which is not a number"),
    ],
)
def test_sets_that_cannot_be_meant_are_named(suffix, content, multi_label, message, tmp_path):
    with pytest.raises(UserError, match=message):
        scanned(tmp_path, (suffix, content), multi_label=multi_label)


def test_the_digest_depends_on_every_set(tmp_path):
    index = scanned(tmp_path, ("cls", b"3 1"), ("cls", b"2"))
    other = replace(index, label=pad_labels(np.array([3, 1, 0], np.int32), np.array([2, 1])))
    one = replace(index, label=np.array([3, 2], np.int32))
    assert len({index.digest, other.digest, one.digest, replace(one, label=one.label[:, None]).digest}) == 4


def test_a_fraction_of_every_class_is_held_out():
    """Of 200 images: a rare class, a frequent one that most images have, and images without labels."""
    rng = np.random.default_rng(0)
    present = rng.random((200, 3)) < [0.05, 0.3, 0.7]
    counts = present.sum(axis=1)
    label = pad_labels(np.nonzero(present)[1].astype(np.int32), counts)
    numbers = np.arange(200)
    source = SourceImages([f"{n}.jpg" for n in numbers], [""] * 200, numbers, numbers, label, tuple("abc"), numbers)
    train, val = hold_out(source, 0.2)
    assert sorted(train.names + val.names) == sorted(source.names)
    for one in range(3):
        total, held = present[:, one].sum(), (val.label == one).sum()
        assert abs(held - 0.2 * total) <= max(1, 0.05 * total)
    assert abs((val.label < 0).all(axis=1).sum() - 0.2 * (counts == 0).sum()) <= 1


@pytest.fixture
def multi(dataset, tmp_path):
    """The index of a data set whose every image has one label or, of class 0, none."""
    index = load_index(f"{dataset}/train.parquet")
    path = tmp_path / "multi.parquet"
    save_index(replace(index, root=str(dataset), label=np.where(index.label == 0, -1, index.label)[:, None]), path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.train={multi}"],
            "val.parquet: has one label per image, and .*multi.parquet is multi-label",
        ),
        (
            ["data.val={multi}"],
            "train.parquet: has one label per image, and .*: index both",
        ),
        (["data.train={multi}", "data.val={multi}", "loss.name=cross_entropy"], "set loss.name=auto"),
        (["data.train={multi}", "data.val={multi}", "loss.label_smoothing=0.1"], "set loss.label_smoothing=0"),
        (["data.train={multi}", "data.val={multi}", "data.balanced=true"], "set data.balanced=false and loss.class"),
    ],
)
def test_settings_for_one_label_are_refused(settings, message, multi, configure):
    config = configure(*(setting.format(multi=multi) for setting in settings))
    with pytest.raises(UserError, match=message):
        make_plan(config, load_indexes(config)[0])
