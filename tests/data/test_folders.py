"""Folders as sources of shards: what looks like a class and is none is recognized and reported."""

import os
import socket
import unicodedata

import pytest
from support.images import encoded

from distrain.data.shards.build import build
from distrain.data.shards.sources import find
from distrain.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """tree(path, ...) -> a folder with an image at each of these paths, a folder where the path ends with a slash."""

    def make(*paths):
        for number, path in enumerate(paths):
            file = tmp_path / "photos" / path
            (file if path.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
            if not path.endswith("/"):
                file.write_bytes(encoded(number))
        return tmp_path / "photos"

    return make


def names_of(folder, **options):
    found = find(folder, "train", **options)
    return sorted(found.names), found.classes


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["Train/a/0.jpg", "Test/a/0.jpg"], r"contains the splits Test, Train, not classes; pass one, such as .*/Test"),
        (["train/a/0.jpg", "val/a/0.jpg", "__MACOSX/._a"], "contains the splits train, val, not classes"),
        (["VALIDATION/0.jpg", "Training_Set/0.jpg"], "contains the splits Training_Set, VALIDATION, not classes"),
        (["a/0.jpg", "b/0.jpg", "val/a/0.jpg"], "contains the splits val, among the classes; pass one"),
        (["a/train/0.jpg", "a/val/1.jpg", "b/0.jpg"], "a/(train|val): looks like a split inside a class"),
        (["imagenet/a/0.jpg", "imagenet/b/0.jpg"], r"its only folder, imagenet, has only folders; pass .*/imagenet"),
        (["Cat/0.jpg", "cat/1.jpg"], "classes Cat and cat differ only in upper and lower case: merge"),
    ],
)
def test_folders_that_do_not_look_like_classes_need_a_flag(tree, paths, message):
    folder = tree(*paths)
    with pytest.raises(UserError, match=rf"{message}.*pass --folders-are-classes"):
        find(folder, "train")
    assert len(find(folder, "train", insist=True)) == len([path for path in paths if "._" not in path])


def test_hidden_and_system_files_are_skipped_and_reported(tree):
    lines = []
    folder = tree(
        "a/0.jpg", "a/.ipynb_checkpoints/0.jpg", "a/@eaDir/0.jpg", "lost+found/", "__MACOSX/a/._0.jpg", "b.jpg"
    )
    assert names_of(folder, info=lines.append) == (["a/0.jpg"], ("a",))
    assert lines == [
        f"{folder}: 1 files in no class folder were skipped, 1 of them images, the first: b.jpg",
        f"{folder}: 4 hidden or system files and folders were skipped, the first: __MACOSX",
    ]


def test_a_circle_of_links_is_named(tree):
    folder = tree("a/0.jpg", "b/1.jpg")
    (folder / "a" / "again").symlink_to(folder)
    with pytest.raises(UserError, match=r"a/again/a: is a link to .*/a, whose images would be listed twice; remove it"):
        find(folder, "train")


def test_a_class_that_is_a_link_to_another_is_named(tree):
    folder = tree("a/0.jpg")
    (folder / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"photos/b: is the same folder as .*photos/a, in another class, by a link"):
        find(folder, "train")


def test_a_class_may_be_a_link_to_a_folder_elsewhere_and_files_in_two_classes_are_reported(tree, tmp_path):
    folder, lines = tree("a/0.jpg", "b/1.jpg"), []
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2.jpg").symlink_to(folder / "a" / "0.jpg")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    assert names_of(folder, info=lines.append) == (["a/0.jpg", "b/1.jpg", "c/2.jpg"], ("a", "b", "c"))
    assert lines == [f"{folder}: 1 files are links to others, 1 of them in another class, such as a/0.jpg and c/2.jpg"]


def test_what_is_no_file_is_listed_as_unreadable_and_not_waited_for(tree, tmp_path):
    folder = tree("a/0.jpg")
    os.mkfifo(folder / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "a" / "socket"))
        (folder / "a" / "zero").symlink_to("/dev/zero")
        (folder / "a" / "self").symlink_to("self")
        built = build(find(folder, "train"), tmp_path / "out", "train", shard_bytes=10**6)
    assert len(built.index) == 1
    reasons = dict(built.unreadable)
    assert reasons.keys() == {"a/pipe.jpg", "a/socket", "a/zero", "a/self"}
    assert reasons["a/pipe.jpg"] == reasons["a/zero"] == "not a regular file"


def test_file_names_of_any_kind_are_built_and_listed_in_one_line_each(tree, tmp_path):
    folder = tree("a b#[1]{2}/x y#.jpg", "a b#[1]{2}/new\nline.jpg")
    for name in (b"caf\xe9.jpg", b"bad\xe9\n.jpg"):
        (folder / "a b#[1]{2}" / os.fsdecode(name)).write_bytes(encoded(7) if name.startswith(b"caf") else b"bad")
    built = build(find(folder, "train"), tmp_path / "out [1]", "train", shard_bytes=10**6)
    assert len(built.index) == 3
    assert built.index.classes == ("a b#[1]{2}",)
    (line,) = (tmp_path / "out [1]" / "train.unreadable.txt").read_text().splitlines()
    assert line.startswith(r"a b#[1]{2}/bad\udce9\n.jpg: not a ")


def test_a_class_whose_name_is_not_utf_8_is_named(tree):
    folder = tree("a/0.jpg")
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match=r"photos: the name of class folder b'caf\\xe9' is not UTF-8; rename it"):
        find(folder, "train")


def test_splits_match_in_both_unicode_forms(tree, tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    folder = tree(f"train/{nfc}/0.jpg", "train/Cafz/1.jpg", f"val/{nfd}/2.jpg", "val/Cafz/3.jpg")
    built = [build(find(folder / s, s), tmp_path / "out", s, shard_bytes=10**6).index for s in ("train", "val")]
    assert built[0].classes == built[1].classes == ("Cafz", nfc)
    (folder / "val" / nfc).mkdir()
    with pytest.raises(UserError, match=r"two folders are called .*Unicode forms"):
        find(folder / "val", "val")
