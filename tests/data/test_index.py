import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from distrain.__main__ import main
from distrain.data import index
from distrain.data.scan import scan
from distrain.errors import UserError


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))


def png(width, height):
    out = BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_an_index_gives_back_the_bytes_and_facts_of_every_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"x/one.png": png(5, 7), "x/one.cls": b"1", "x/two.cls": b"0\n", "x/two.png": png(3, 2)},
    )
    write_tar(tmp_path / "b.tar", {"three.json": b"{}", "three.cls": b"1", "three.png": png(4, 4)})
    index.save(scan(str(tmp_path), ["a.tar", "b.tar"], ["cat", "dog"]), tmp_path / "i.parquet")
    loaded = index.load(f"{tmp_path}/i.parquet")
    sizes = [(tmp_path / name).stat().st_size for name in ("a.tar", "b.tar")]
    assert [shard[:2] for shard in loaded.shards] == [("a.tar", sizes[0]), ("b.tar", sizes[1])]
    assert loaded.classes == ("cat", "dog")
    assert loaded.label.tolist() == [1, 0, 1]
    assert loaded.width.tolist() == [5, 3, 4]
    assert loaded.height.tolist() == [7, 2, 4]
    stored = (tmp_path / "a.tar").read_bytes()
    assert stored[loaded.offset[1] : loaded.offset[1] + loaded.size[1]] == png(3, 2)


def test_the_digest_tells_the_data_and_not_its_place(dataset, tmp_path):
    original = index.load(f"{dataset}/train.parquet")
    moved = tmp_path / "elsewhere.parquet"
    index.save(original, moved)
    assert index.load(str(moved)).digest == original.digest
    other = index.Index(**{**vars_of(original), "label": original.label[::-1].copy()})
    assert other.digest != original.digest


def vars_of(built):
    return {name: getattr(built, name) for name in built.__dataclass_fields__}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"one.png": png(2, 2)}, r"a\.tar: sample one needs an image .* and a \.cls label"),
        ({"one.png": png(2, 2), "one.cls": b"2"}, r"a\.tar: sample one has label 2, outside 0\.\.1"),
        (
            {"one.png": png(2, 2), "one.cls": b"cat"},
            r"a\.tar: sample one has label 'cat', which is no number",
        ),
        ({"one.png": b"nonsense", "one.cls": b"1"}, r"a\.tar: sample one is not a readable image"),
    ],
)
def test_a_sample_that_cannot_be_indexed_is_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=message):
        scan(str(tmp_path), ["a.tar"], ["cat", "dog"])


def test_a_shard_that_is_missing_or_no_tar_is_named(tmp_path):
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"a\.tar: shard cannot be read"):
        scan(str(tmp_path), ["a.tar"], ["cat"])
    with pytest.raises(UserError, match=r"b\.tar: shard cannot be read"):
        scan(str(tmp_path), ["b.tar"], ["cat"])


def test_a_file_that_is_no_index_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.parquet: no such index"):
        index.load(f"{tmp_path}/none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"bad\.parquet: not an index"):
        index.load(f"{tmp_path}/bad.parquet")


def test_shards_can_be_indexed_from_the_command_line(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "a.tar", {"one.png": png(5, 7), "one.cls": b"1"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    command = [
        "shards",
        "index",
        f"{tmp_path}/a.tar",
        "--out",
        f"{tmp_path}/i.parquet",
        "--classes",
        f"{tmp_path}/classes.txt",
    ]
    monkeypatch.setattr("sys.argv", ["distrain", *command])
    assert main() == 0
    assert "1 images, 2 classes, 1 shards" in capsys.readouterr().out
    np.testing.assert_array_equal(index.load(f"{tmp_path}/i.parquet").label, [1])
