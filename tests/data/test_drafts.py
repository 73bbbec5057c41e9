"""Builds of one folder at the same time, and what killed ones leave."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.images import encoded

from distrain.data.shards import build as build_module
from distrain.data.shards.build import build
from distrain.data.shards.drafts import draft
from distrain.data.shards.sources import find


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    (root / "cat").mkdir()
    for number in range(60):
        (root / "cat" / f"{number}.jpg").write_bytes(encoded(number))
    return root


def make(source: Path, out: Path, **options):
    return build(find(source, "train", None), out, "train", shard_bytes=20_000, **options)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_builds_of_one_folder_at_once_write_it_as_one_does(photos, tmp_path):
    make(photos, tmp_path / "alone")
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(make, photos, tmp_path / "out", workers=2) for _ in range(3)]:
            done.result()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_of_two_different_builds_that_begin_at_once_one_is_refused(photos, tmp_path, monkeypatch):
    both, exists = threading.Barrier(2), Path.exists

    def exists_to_both(path: Path) -> bool:
        found = exists(path)
        if path.name == "train.build.json":
            both.wait(30)
        return found

    with ThreadPoolExecutor() as pool, monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists_to_both)
        refused = [pool.submit(make, photos, tmp_path / "out", seed=seed) for seed in (1, 2)]
        refused = [done.exception() for done in refused]
    assert [str(error).endswith("or delete the split's files") for error in refused if error] == [True]
    make(photos, tmp_path / "alone", seed=1 + refused.index(None))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_drafts_of_killed_builds_are_removed_and_those_of_live_ones_and_other_hosts_kept(photos, tmp_path):
    killed, elsewhere = (
        tmp_path / f"train-000000.tar.{host}-{'0' * 32}.tmp" for host in (socket.gethostname(), "elsewhere")
    )
    for path in (killed, elsewhere):
        path.write_bytes(b"half")
    with draft(tmp_path / "train-000001.tar", tmp_path / "train.parquet") as live:
        live.write(b"half")
        (own,) = set(tmp_path.glob("*.tmp")) - {killed, elsewhere}
        make(photos, tmp_path)
        assert set(tmp_path.glob("*.tmp")) == {own, elsewhere}


def test_a_build_that_is_killed_once_it_has_replaced_a_shard_leaves_no_index_of_the_old_one(tmp_path, monkeypatch):
    photo, out = tmp_path / "photos" / "cat" / "a.jpg", tmp_path / "out"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(encoded(0).ljust(2000, b"."))
    make(tmp_path / "photos", out)
    photo.write_bytes(encoded(1).ljust(2000, b"."))
    before = (out / "train-000000.tar").read_bytes()

    def kill(index, path):
        assert (out / "train-000000.tar").read_bytes() != before
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "save_index", kill)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "photos", out)
    assert not (out / "train.parquet").exists()
