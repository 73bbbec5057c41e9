"""Shards built from images."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from support.images import encoded, png

from distrain.data.shards.build import build
from distrain.data.shards.sources import DEVKIT, find
from distrain.data.storage.index_file import load_index
from distrain.data.storage.store import LocalStore
from distrain.errors import UserError

SYNSETS = ["n02119789", "n01440764", "n03000684"]  # in the order of ILSVRC ids, which is not that of names
NO_LABELS = {"n01440764": 0, "n02119789": 1, "n03000684": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 images in three classes, of all formats and name styles."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(120):
        path = root / ("cat", "dog", "owl")[number % 3] / f"{number}.a b.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(number, ("JPEG", "PNG", "WEBP")[number % 5 % 3]))
    (root / "dog" / "deep" / "er").mkdir(parents=True)
    (root / "dog" / "deep" / "er" / "x.png").write_bytes(encoded(1000, "PNG"))
    (root / ".cache").mkdir()
    (root / "dog" / ".DS_Store").write_bytes(b"junk")
    return root


def make(source, out, split="train", shard_bytes=20_000, classes=None, **options):
    return build(find(source, split, classes), out, split, shard_bytes=shard_bytes, **options)


def contents(out):
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def images_of(built):
    """The (encoded image, class) pairs in the shards, sorted."""
    store = LocalStore(built)
    return sorted((store.read(sample), built.classes[built.label[sample]]) for sample in range(len(built)))


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def tar_of(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return out.getvalue()


@pytest.fixture
def imagenet(tmp_path):
    """The files of ILSVRC2012, with three synsets of 4 images and 6 for validation."""
    train = {
        f"{synset}.tar": tar_of({f"{synset}_{image}.JPEG": encoded(hash_of(synset, image)) for image in range(4)})
        for synset in SYNSETS
    }
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 7)]
    val = {name: encoded(number) for number, name in enumerate(names, 1)}
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict(reversed(val.items()))))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(number, synset, 0) for number, synset in enumerate(SYNSETS, 1)] + [(4, "n00001740", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields)})
    with tarfile.open(tmp_path / DEVKIT, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"1\n2\n3\n3\n1\n2\n")
    return tmp_path


def hash_of(synset, image):
    return int(synset[1:]) * 10 + image


def test_images_keep_their_original_bytes(folder, tmp_path):
    built = make(folder, tmp_path).index
    sources = sorted((path.read_bytes(), path.parts[len(folder.parts)]) for path in folder.rglob("[0-9x]*.*"))
    assert len(sources) == 121
    assert images_of(built) == sources


def test_the_index_that_is_written_is_that_of_the_shards(folder, tmp_path):
    built = make(folder, tmp_path).index
    loaded = load_index(f"{tmp_path}/train.parquet")
    assert loaded.digest == built.digest
    assert loaded.shards == built.shards
    assert set(loaded.width) == {12}
    assert set(loaded.height) == {9}


def test_the_same_folder_gives_the_same_bytes_with_any_number_of_workers(folder, tmp_path):
    make(folder, tmp_path / "one", workers=1)
    make(folder, tmp_path / "five", workers=5)
    assert len(contents(tmp_path / "one")) > 5
    assert contents(tmp_path / "one") == contents(tmp_path / "five")


def test_every_class_occurs_in_all_shards(folder, tmp_path):
    built = make(folder, tmp_path, shard_bytes=100_000).index
    assert len(built.shards) == 3
    counts = np.array([np.bincount(built.label[built.shard == shard], minlength=3) for shard in range(3)])
    assert counts.min() > len(built) / 9 / 3


def test_another_seed_is_another_order_of_the_same_images(folder, tmp_path):
    first, second = (make(folder, tmp_path / str(seed), seed=seed).index for seed in (0, 1))
    assert images_of(first) == images_of(second)
    assert first.digest != second.digest


def test_shards_are_of_equal_size_near_the_requested_one(folder, tmp_path):
    sizes = [shard.size for shard in make(folder, tmp_path, shard_bytes=80_000).index.shards]
    assert max(sizes) <= 80_000 + 3_000 + 10_240  # at most one image more; a tar is padded to 10,240 bytes
    assert max(sizes) - min(sizes) <= 10_240


def test_webdataset_reads_the_shards(folder, tmp_path):
    import webdataset

    built = make(folder, tmp_path).index
    shards = [built.location(shard) for shard in range(len(built.shards))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert [int(sample["cls"]) for sample in samples] == built.label.tolist()
    assert {next(sample[key] for key in ("jpg", "png", "webp") if key in sample).shape for sample in samples} == {
        (9, 12, 3)
    }
    assert len({sample["__key__"] for sample in samples}) == len(built)


@pytest.mark.parametrize(
    ("module", "function", "call"), [("build", "suffix_of", 30), ("drafts.os", "fsync", 9), ("build", "save_index", 1)]
)
def test_a_killed_build_is_completed_by_the_second_run(folder, tmp_path, module, function, call):
    make(folder, tmp_path / "uninterrupted")
    out = tmp_path / "out"
    script = f"""
import os, signal, sys
from distrain.__main__ import main
from distrain.data import cli
from distrain.data.shards import build, drafts

def kill_at_last(*arguments):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments)

calls, cli.MEGABYTE, function = 0, 20_000, {module}.{function}
{module}.{function} = kill_at_last
sys.argv = ["distrain", "shards", "build", {str(folder)!r}, "--out", {str(out)!r}, "--shard-mb", "1", "--workers", "1"]
main()
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not (out / "train.parquet").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("train-*.tar")}

    built = make(folder, out)
    assert built.reused == len(kept) > 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(out) == contents(tmp_path / "uninterrupted")


def test_a_shard_that_is_truncated_missing_or_of_other_images_is_rebuilt(folder, tmp_path):
    make(folder, tmp_path)
    whole = contents(tmp_path)
    os.truncate(tmp_path / "train-000000.tar", 12_000)
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / "train-000002.tar").write_bytes(whole["train-000003.tar"])
    assert make(folder, tmp_path).reused == len([name for name in whole if name.endswith(".tar")]) - 3
    assert contents(tmp_path) == whole


def test_a_shard_with_an_earlier_version_of_an_image_is_rebuilt(tmp_path):
    photo = tmp_path / "photos" / "cat" / "a.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(encoded(0))
    make(tmp_path / "photos", tmp_path / "out")
    photo.write_bytes(encoded(1, size=(20, 20)))
    (tmp_path / "out" / "train.build.json").unlink()
    assert images_of(make(tmp_path / "photos", tmp_path / "out").index) == [(encoded(1, size=(20, 20)), "cat")]


def test_files_that_cannot_be_read_are_excluded_and_listed(folder, tmp_path, capsys):
    source, out = tmp_path / "photos", tmp_path / "out"
    (source / "cat").mkdir(parents=True)
    (source / "cat" / "good.jpg").write_bytes(encoded(0))
    (source / "cat" / "truncated.jpg").write_bytes(encoded(1, size=(60, 60))[:-900])
    (source / "cat" / "truncated.png").write_bytes(encoded(1, "PNG", size=(60, 60))[:-900])
    (source / "cat" / "none.jpg").write_bytes(b"")
    (source / "cat" / "notes.txt").write_bytes(b"not an image")
    (source / "cat" / "old.gif").write_bytes(encoded(2, "GIF"))
    (source / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    built = make(source, out)
    assert images_of(built.index) == [(encoded(0), "cat")]
    listed = (out / "train.unreadable.txt").read_text()
    assert sorted(line.partition(":")[0] for line in listed.splitlines()) == [
        "cat/gone.jpg", "cat/none.jpg", "cat/notes.txt", "cat/old.gif", "cat/truncated.jpg", "cat/truncated.png",
    ]  # fmt: skip
    assert "cat/none.jpg: empty file" in listed
    assert "cat/gone.jpg: file not found" in listed
    again = make(source, out)
    assert again.reused == 1
    assert sorted(again.unreadable) == sorted(built.unreadable)


def test_an_image_that_claims_to_be_huge_is_excluded_before_it_is_decoded(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "big.png").write_bytes(png(12_000, 10_000, 8, 2, b""))
    (tmp_path / "photos" / "cat" / "good.jpg").write_bytes(encoded(0, size=(10, 10)))
    built = make(tmp_path / "photos", tmp_path / "out")
    assert built.unreadable == [("cat/big.png", "12000 x 10000 pixels exceed the limit of 100,000,000")]


def test_a_source_without_readable_images_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "notes.txt").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"none of the 1 images can be read; the first: cat/notes\.txt: not a JPEG"):
        make(tmp_path / "photos", tmp_path / "out")
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_a_folder_never_mixes_shards_of_different_builds(folder, tmp_path):
    make(folder, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"train\.build\.json: .*\(shuffle_seed differ\)"):
        make(folder, tmp_path, seed=1)
    with pytest.raises(UserError, match=r"train\.build\.json: .*\(source differ\)"):
        make(folder, tmp_path, classes=["owl", "dog", "cat"])
    assert contents(tmp_path) == before


def test_the_splits_of_a_folder_must_have_the_same_classes(folder, tmp_path):
    make(folder, tmp_path / "out")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    (tmp_path / "val" / "dog" / "x.jpg").write_bytes(encoded(0))
    with pytest.raises(UserError, match=r"train\.parquet: has 3 classes, val would have 1: only one has cat, owl"):
        make(tmp_path / "val", tmp_path / "out", "val")
    built = make(tmp_path / "val", tmp_path / "out", "val", classes=["cat", "dog", "owl"]).index
    assert built.label.tolist() == [1]


def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(folder, small_disk):
    (small_disk / "filler").write_bytes(bytes(2**21 - 4 * 4096))  # the record of the build fits beside it
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        make(folder, small_disk / "out")
    assert [path.name for path in (small_disk / "out").iterdir()] == ["train.build.json"]
    (small_disk / "filler").unlink()
    assert len(make(folder, small_disk / "out").index) > 0


def test_the_original_tars_of_imagenet_are_read_in_place(imagenet, tmp_path):
    built = make(imagenet, tmp_path / "out", shard_bytes=4_000).index
    assert built.classes == tuple(sorted(SYNSETS))
    expected = [(encoded(hash_of(synset, image)), synset) for synset in SYNSETS for image in range(4)]
    assert images_of(built) == sorted(expected)


def test_validation_images_get_the_labels_of_the_devkit(imagenet, tmp_path):
    built = make(imagenet, tmp_path / "out", "val").index
    assert built.classes == tuple(sorted(SYNSETS))
    truth = [SYNSETS[id - 1] for id in (1, 2, 3, 3, 1, 2)]
    assert images_of(built) == sorted((encoded(number), synset) for number, synset in enumerate(truth, 1))


def test_training_labels_are_the_same_with_and_without_the_devkit(imagenet, tmp_path):
    with_it = make(imagenet, tmp_path / "with").index
    (imagenet / DEVKIT).unlink()
    without = make(imagenet / "ILSVRC2012_img_train.tar", tmp_path / "without").index
    assert with_it.digest == without.digest
    assert with_it.classes == without.classes


@pytest.mark.parametrize(
    ("synset", "message"),
    [("n09999999", "n09999999 is not one of the 3 classes"), ("dogs", r"dogs\.tar is not a synset's tar")],
)
def test_a_wrong_synset_is_named(imagenet, synset, message):
    (imagenet / "ILSVRC2012_img_train.tar").write_bytes(tar_of({f"{synset}.tar": tar_of({"a.JPEG": encoded(0)})}))
    with pytest.raises(UserError, match=message):
        find(imagenet, "train")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("shift", [-300, 0, 300, 700])
def test_a_truncated_tar_of_imagenet_is_named(imagenet, split, shift):
    archive = imagenet / f"ILSVRC2012_img_{split}.tar"
    with tarfile.open(archive) as tar:
        third = tar.getmembers()[2].offset
    os.truncate(archive, third + shift)
    with pytest.raises(UserError, match=rf"ILSVRC2012_img_{split}\.tar.*: (truncated or damaged|cannot be read)"):
        find(imagenet, split)


def test_a_devkit_that_is_missing_wrong_or_of_other_images_is_named(imagenet):
    (imagenet / "ILSVRC2012_img_val.tar").write_bytes(tar_of({"ILSVRC2012_val_00000001.JPEG": encoded(1)}))
    with pytest.raises(UserError, match=r"1 images, but ILSVRC2012_devkit_t12\.tar\.gz has labels for 6"):
        find(imagenet, "val")
    (imagenet / DEVKIT).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz: not the ILSVRC2012 devkit"):
        find(imagenet, "val")
    (imagenet / DEVKIT).unlink()
    with pytest.raises(UserError, match=r"devkit_t12\.tar\.gz: file not found; .* pass --devkit"):
        find(imagenet, "val")


def test_the_record_of_a_build_is_kept_next_to_it(folder, tmp_path):
    make(folder, tmp_path, seed=3)
    record = json.loads(Path(tmp_path, "train.build.json").read_text())
    assert record["images"] == 121
    assert record["shuffle_seed"] == 3


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_record_of_a_build_is_one_line_with_the_cure(folder, tmp_path, content):
    make(folder, tmp_path)
    complete = contents(tmp_path)
    record = tmp_path / "train.build.json"
    record.write_text(content)
    with pytest.raises(UserError, match=rf"^{record}: .*: delete it and run the build again$"):
        make(folder, tmp_path)
    record.unlink()
    make(folder, tmp_path)
    assert contents(tmp_path) == complete
