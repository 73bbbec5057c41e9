import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter

from distrain.__main__ import main
from distrain.bench.loader import STAGES
from distrain.bench.rounds import Rate, measure_interleaved, ratio
from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import save_index


def test_candidates_are_interleaved_after_a_warm_up():
    calls = []

    def candidate(name):
        def work():
            calls.append(name)
            return 3

        return work

    rates = measure_interleaved({"a": candidate("a"), "b": candidate("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert [(rate.name, len(rate.rounds)) for rate in rates] == [("a", 2), ("b", 2)]


def test_a_ratio_is_computed_within_each_round():
    rates = [Rate("ours", (10.0, 1.0, 30.0)), Rate("reference", (5.0, 0.5, 10.0))]
    assert ratio(rates, "ours", "reference") == 2.0


def bench(monkeypatch, index, *words):
    """Run `bench loader` and return its exit code."""
    small = ("--images", "24", "--batch", "6", "--rounds", "1", "--size", "8", "--threads", "1")
    monkeypatch.setattr("sys.argv", ["distrain", "bench", "loader", str(index), *small, *words])
    return main()


def test_loaders_are_compared_with_other_libraries(dataset, tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    assert bench(monkeypatch, dataset / "train.parquet", "--json", str(results)) == 0
    measured = json.loads(results.read_text())
    assert list(measured["rounds"]) == [
        "decode only",
        "distrain, torch",
        "distrain, dali",
        "webdataset + DataLoader",
        "DALI's WebDataset reader",
    ]
    assert all(rate > 0 for (rate,) in measured["rounds"].values())
    assert list(measured["microseconds"]) == list(STAGES)
    assert "vs decode only" in " ".join(capsys.readouterr().out.split())


def test_shards_with_unreadable_images_are_measured_without_dali(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path, [picture(number) for number in range(12)] + [b"no image"])
    results = tmp_path / "results.json"
    assert bench(monkeypatch, tmp_path / "train.parquet", "--json", str(results)) == 0
    assert len(json.loads(results.read_text())["rounds"]) == 4
    printed = " ".join(capsys.readouterr().out.split())
    assert "DALI's WebDataset reader is not measured: it cannot skip unreadable images" in printed


def test_every_candidate_reads_shards_of_other_formats(tmp_path, monkeypatch):
    write_shard(tmp_path, [picture(number) for number in range(12)])
    results = tmp_path / "results.json"
    assert bench(monkeypatch, tmp_path / "train.parquet", "--json", str(results)) == 0
    assert len(json.loads(results.read_text())["rounds"]) == 5


def test_shards_without_a_readable_image_are_rejected(tmp_path, monkeypatch, capsys):
    write_shard(tmp_path, [b"no image"] * 3)
    assert bench(monkeypatch, tmp_path / "train.parquet") == 78
    assert capsys.readouterr().err.endswith("train.parquet: none of its 3 images was readable when it was indexed\n")


@pytest.mark.parametrize("name", ["--images", "--batch", "--rounds", "--size", "--threads"])
def test_numbers_below_one_are_rejected_in_one_line(dataset, monkeypatch, capsys, name):
    assert bench(monkeypatch, dataset / "train.parquet", name, "0") == 78
    assert capsys.readouterr().err == f"distrain: {name} must be at least 1\n"


def test_an_unwritable_json_file_is_rejected_before_anything_is_measured(dataset, monkeypatch, capsys):
    monkeypatch.setattr("distrain.bench.cli.bench_loaders", None)
    assert bench(monkeypatch, dataset / "train.parquet", "--json", f"{dataset}/no/results.json") == 78
    assert (
        capsys.readouterr().err
        == f"distrain: --json {dataset}/no/results.json: cannot be written: No such file or directory\n"
    )


def picture(number):
    out = BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "WEBP")
    return out.getvalue()


def write_shard(folder, images):
    """Write images as .webp, with labels in .json."""
    with TarWriter(str(folder / "train.tar")) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:03d}", "webp": image, "json": {"label": 0}})
    save_index(scan(str(folder), ["train.tar"], ["any"]), folder / "train.parquet")
