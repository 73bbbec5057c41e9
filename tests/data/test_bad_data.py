"""Runs on damaged data, on both loaders: the quarantine is right and everything else is trained on."""

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from launching import SMALL, train
from PIL import Image
from webdataset import TarWriter

from distrain.data import index
from distrain.data.scan import scan

SETTINGS = (
    *SMALL,
    "model.num_classes=3",
    "data.image_size=8",
    "data.val_resize=8",
    "data.crop=pad",
    "data.max_bad=0.2",
    "batch.lanes=2",
    "batch.per_lane=5",
    "train.epochs=2",
)
BAD = {3: "zero bytes", 11: "truncated", 12: "garbage after the header", 20: "a bomb", 33: "changed since indexing"}


def picture(number: int) -> bytes:
    out = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Fifty images of which five are bad, each in its own way; three of them in a row for one lane."""
    folder = tmp_path_factory.mktemp("damaged")
    contents = {number: picture(number) for number in range(50)}
    contents |= {3: b"", 11: contents[11][: len(contents[11]) // 2], 12: contents[12][:33] + bytes(200), 20: bomb()}
    for split in ("train", "val"):
        with TarWriter(str(folder / f"{split}.tar")) as writer:
            for number, content in contents.items():
                writer.write({"__key__": f"{number:03d}", "png": content, "cls": number % 3})
        built = scan(str(folder), [f"{split}.tar"], ["a", "b", "c"])
        index.save(built, folder / f"{split}.parquet")
        flip_a_byte(folder / f"{split}.tar", int(built.offset[33]) + 60)
    return folder


def flip_a_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 255
    path.write_bytes(content)


def on(folder: Path) -> list[str]:
    return [f"data.train={folder}/train.parquet", f"data.val={folder}/val.parquet"]


def quarantined(folder: Path, split: str) -> set[int]:
    entries = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return {entry["sample"] for entry in entries if entry["split"] == split}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_bad_samples_are_listed_and_all_others_trained_on(damaged, tmp_path, loader, ranks):
    recorder = (str(Path(__file__).parents[1] / "recording_main.py"),)
    result = train(tmp_path / "run", *SETTINGS, *on(damaged), f"data.loader={loader}", ranks=ranks, program=recorder)
    assert result.code == 0, result.output
    assert quarantined(result.folder, "train") == quarantined(result.folder, "val") == set(BAD)
    assert "of 45 images" in result.output.strip().splitlines()[-1]
    assert result.series("data/quarantined")[10] == 10
    seen = [json.loads(line) for file in result.folder.glob("consumed-*") for line in file.read_text().splitlines()]
    assert len(seen) == 100
    assert {sample for epoch, sample in seen if epoch == 0} == set(range(50)) - set(BAD)


def test_a_run_on_damaged_data_is_the_same_each_time(damaged, tmp_path):
    runs = [train(tmp_path / name, *SETTINGS, *on(damaged), ranks=ranks) for name, ranks in (("a", 2), ("b", 2))]
    assert runs[0].digest == runs[1].digest
    assert runs[0].digest.startswith("sha256:")


def test_too_many_bad_samples_end_the_run_with_one_line_and_exit_78(damaged, tmp_path):
    result = train(tmp_path / "run", *SETTINGS, *on(damaged), "data.max_bad=0.05")
    assert result.code == 78, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("distrain:")]
    assert "3 of 50 samples of data.train cannot be used, more than data.max_bad=0.05 allows" in line
    assert "Traceback" not in result.output


@pytest.mark.parametrize("harm", ["missing", "cut short"])
def test_a_shard_that_is_missing_or_cut_short_fails_the_run_by_name(damaged, tmp_path, harm):
    for name in ("train.parquet", "val.parquet", "train.tar", "val.tar"):
        (tmp_path / name).write_bytes((damaged / name).read_bytes())
    shard = tmp_path / "train.tar"
    content = shard.read_bytes()
    shard.unlink()
    if harm == "cut short":
        shard.write_bytes(content[:-3000])
    result = train(tmp_path / "run", *SETTINGS, *on(tmp_path))
    assert result.code == 78, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert f"{tmp_path}/train.tar" in result.output


def test_a_label_outside_the_classes_is_refused_before_any_work(damaged, tmp_path):
    built = index.load(f"{damaged}/train.parquet")
    built.label[7] = 3
    for split in ("train", "val"):
        index.save(built, tmp_path / f"{split}.parquet")
    result = train(tmp_path / "run", *SETTINGS, *on(tmp_path))
    assert result.code == 78
    assert result.output.strip().endswith("train.parquet: sample 7 has label 3, outside 0..2: index the shards again")
