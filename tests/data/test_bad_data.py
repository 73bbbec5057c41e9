"""Runs on damaged data, with both loaders: bad samples are quarantined and all others are trained on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.forked_runs import train_forked
from support.images import encoded, png
from support.processes import SMALL
from webdataset import TarWriter

from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import load_index, save_index

SAMPLES = 50
SETTINGS = (
    *SMALL,
    f"model.num_classes={SAMPLES}",
    "data.image_size=8",
    "data.val_resize=8",
    "augment.crop=pad",
    "data.max_bad=0.2",
    "batch.lanes=2",
    "batch.per_lane=5",
    "train.epochs=2",
)
STEPS_PER_EPOCH = 5

UNREADABLE = "was not a readable image when indexed: "
BAD = {
    3: UNREADABLE + "empty file",
    11: UNREADABLE + "image file is truncated",
    12: UNREADABLE + "not a JPEG, PNG, WEBP image",
    20: UNREADABLE + r"Image size \(3600000000 pixels\) exceeds limit.*",
    27: UNREADABLE + "not a JPEG, PNG, WEBP image",
    33: r".*the \d+ bytes at offset \d+ do not match the index; restore the shard or index it again",
    41: "cannot be decoded: .*",
}
GOOD = set(range(SAMPLES)) - set(BAD)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Fifty images, each with its own class. Seven are bad, each in a different way; three of them are consecutive in
    one lane. One is truncated although index and checksum say it is an image of 48 x 48 pixels."""
    folder = tmp_path_factory.mktemp("damaged")
    contents = {number: encoded(number, "PNG", (8, 8)) for number in range(SAMPLES)}
    bomb = png(60_000, 60_000, 8, 2, b"")  # a hundred bytes that claim 3.6 gigapixels
    contents |= {3: b"", 11: contents[11][: len(contents[11]) // 2], 12: contents[12][:33] + bytes(200), 20: bomb}
    contents |= {27: b"<html>404 Not Found</html>"}
    photo = encoded(41, "JPEG", (48, 48))
    for split in ("train", "val"):
        with TarWriter(str(folder / f"{split}.tar")) as writer:
            for number, content in contents.items():
                image = {"jpg": photo[: len(photo) // 2]} if number == 41 else {"png": content}
                writer.write({"__key__": f"{number:03d}", **image, "cls": number})
        index = scan(str(folder), [f"{split}.tar"], [str(number) for number in range(SAMPLES)])
        index.width[41] = index.height[41] = 48
        save_index(index, folder / f"{split}.parquet")
        flip_a_byte(folder / f"{split}.tar", int(index.offset[33]) + 60)
    return folder


def flip_a_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)


def on(folder: Path) -> list[str]:
    return [f"data.train={folder}/train.parquet", f"data.val={folder}/val.parquet"]


@pytest.fixture(scope="module")
def run(damaged, tmp_path_factory):
    """run(loader, ranks) -> how a run on the damaged data ended. Each is run once."""
    folder, results = tmp_path_factory.mktemp("runs"), {}

    def once(loader, ranks):
        key = f"{loader}-{ranks}"
        if key not in results:
            settings = (*SETTINGS, *on(damaged), f"data.loader={loader}")
            results[key] = train_forked(folder / key, *settings, ranks=ranks)
        assert results[key].code == 0, results[key].output
        return results[key]

    return once


every_setup = pytest.mark.parametrize(("loader", "ranks"), [("torch", 1), ("torch", 2), ("dali", 1), ("dali", 2)])


@every_setup
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_bad_sample_is_listed_once_with_its_reason(run, loader, ranks, split):
    entries = map(json.loads, (run(loader, ranks).folder / "quarantine.jsonl").read_text().splitlines())
    listed = sorted((entry["sample"], entry["reason"]) for entry in entries if entry["split"] == split)
    assert [sample for sample, _ in listed] == list(BAD)
    for sample, reason in listed:
        assert re.fullmatch(rf"{split}\.tar at \d+: {BAD[sample]}", reason)


@every_setup
def test_all_other_samples_are_trained_on_in_every_epoch(run, loader, ranks):
    batches = run(loader, ranks).delivered
    for epoch in range(2):
        seen = [
            label
            for of_rank in batches
            for batch in of_rank[epoch * len(of_rank) // 2 : (epoch + 1) * len(of_rank) // 2]
            for label in batch
        ]
        assert len(seen) == SAMPLES
        assert set(seen) == GOOD


@every_setup
def test_validation_counts_all_other_samples(run, loader, ranks):
    assert f"of {len(GOOD)} images" in run(loader, ranks).last_line
    assert run(loader, ranks).series("data/quarantined")[2 * STEPS_PER_EPOCH] == 2 * len(BAD)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_on_damaged_data_is_reproducible(run, damaged, tmp_path, loader):
    again = train_forked(tmp_path / "again", *SETTINGS, *on(damaged), f"data.loader={loader}", ranks=2)
    assert again.digest == run(loader, 2).digest
    assert again.digest.startswith("sha256:")


def test_any_ranks_and_loader_replace_a_bad_sample_by_the_same_one(run):
    single = [batch for batches in run("torch", 1).delivered for batch in batches]
    together = [batch for pair in zip(*run("dali", 2).delivered, strict=True) for batch in pair]
    assert together == single


def assert_one_line(result, message):
    assert result.code == 78, result.output
    assert {line for line in result.lines if not line.startswith("DALI rejected an image")} == {message}
    assert "Traceback" not in result.output


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_too_many_bad_samples_end_the_run_with_one_line(damaged, tmp_path, loader):
    result = train_forked(tmp_path / "run", *SETTINGS, *on(damaged), "data.max_bad=0.05", f"data.loader={loader}")
    found = re.search(r"(\d) of 50 samples", result.output)  # more may be found before the run ends
    assert found is not None, result.output
    assert 3 <= int(found[1]) <= len(BAD)
    assert_one_line(
        result,
        f"{found[1]} of 50 samples of data.train cannot be used, more than data.max_bad=0.05 allows: "
        f"{tmp_path}/run/quarantine.jsonl lists them; fix the data or raise data.max_bad",
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_run_without_any_good_sample_ends_with_one_line(damaged, tmp_path, split, ranks):
    index = load_index(f"{damaged}/{split}.parquet")
    save_index(replace(index, width=index.width * 0), damaged / "none.parquet")
    where = (*on(damaged), f"data.{split}={damaged}/none.parquet")
    result = train_forked(tmp_path / "run", *SETTINGS, *where, "data.max_bad=1", ranks=ranks)
    listed = f"{tmp_path}/run/quarantine.jsonl lists them; fix the data"
    assert_one_line(result, f"none of the 50 samples of data.{split} can be used: {listed}")


def test_data_fixed_before_a_restart_counts_as_good(damaged, tmp_path):
    copy = shutil.copytree(damaged, tmp_path / "copy")
    settings = (*SETTINGS, *on(copy), "data.max_bad=0.12")
    result = train_forked(tmp_path / "run", *settings)
    assert "7 of 50 samples of data.train cannot be used" in result.output
    for split in ("train", "val"):
        flip_a_byte(copy / f"{split}.tar", int(load_index(f"{copy}/{split}.parquet").offset[33]) + 60)
    result = train_forked(tmp_path / "run", *settings)
    assert result.code == 0, result.output
    assert f"of {len(GOOD) + 1} images" in result.last_line


FAULTS = {
    "missing": "train.tar: shard cannot be opened: No such file or directory; restore it or index the shards again",
    "cut short": "train.tar: shard has {short:,} bytes, {whole:,} when it was indexed; restore it or index it again",
    "changed": "train.tar: content differs from the index; restore the original shard or index it again",
    "mislabelled": "train.parquet: sample 7 has label 50, outside 0..49: index the shards again",
}


@pytest.mark.parametrize(("loader", "ranks"), [("torch", 1), ("dali", 1), ("torch", 2)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_shard_or_index_ends_the_run_with_its_name(damaged, tmp_path, fault, loader, ranks):
    copy = shutil.copytree(damaged, tmp_path / "copy")
    content = (copy / "train.tar").read_bytes()
    index = load_index(f"{copy}/train.parquet")
    index.label[7] = SAMPLES
    {
        "missing": lambda: (copy / "train.tar").unlink(),
        "cut short": lambda: (copy / "train.tar").write_bytes(content[:-3000]),
        "changed": lambda: (copy / "train.tar").write_bytes(content[::-1]),
        "mislabelled": lambda: save_index(index, copy / "train.parquet"),
    }[fault]()
    result = train_forked(tmp_path / "run", *SETTINGS, *on(copy), f"data.loader={loader}", ranks=ranks)
    assert_one_line(result, f"{copy}/" + FAULTS[fault].format(short=len(content) - 3000, whole=len(content)))
