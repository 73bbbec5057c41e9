import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from support import images

from distrain.data.index import Index, Shard
from distrain.data.shards.scan import scan
from distrain.data.storage.index_file import load_index, save_index
from distrain.errors import UserError


def write_tar(path, members):
    images.write_tar(path, members.items())


def png(width, height):
    out = BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_an_index_holds_the_location_and_facts_of_every_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"x/one.png": png(5, 7), "x/one.cls": b"1", "x/two.cls": b"0\n", "x/two.png": png(3, 2)},
    )
    write_tar(tmp_path / "b.tar", {"three.json": b"{}", "three.cls": b"1", "three.png": png(4, 4)})
    save_index(scan(str(tmp_path), ["a.tar", "b.tar"], ["cat", "dog"]), tmp_path / "i.parquet")
    loaded = load_index(f"{tmp_path}/i.parquet")
    sizes = [(tmp_path / name).stat().st_size for name in ("a.tar", "b.tar")]
    assert [shard[:2] for shard in loaded.shards] == [("a.tar", sizes[0]), ("b.tar", sizes[1])]
    assert loaded.classes == ("cat", "dog")
    assert loaded.label.tolist() == [1, 0, 1]
    assert loaded.width.tolist() == [5, 3, 4]
    assert loaded.height.tolist() == [7, 2, 4]
    stored = (tmp_path / "a.tar").read_bytes()
    assert stored[loaded.offset[1] : loaded.offset[1] + loaded.size[1]] == png(3, 2)


def test_an_index_that_cannot_be_replaced_stays_as_it_was(dataset, tmp_path, monkeypatch):
    path = tmp_path / "i.parquet"
    index, other = (load_index(f"{dataset}/{split}.parquet") for split in ("train", "val"))
    save_index(index, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="injected"):
        save_index(other, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


def fail(*arguments):
    raise OSError("injected")


def test_the_digest_does_not_depend_on_the_location_of_the_data(dataset, tmp_path):
    original = load_index(f"{dataset}/train.parquet")
    moved = tmp_path / "elsewhere.parquet"
    save_index(replace(original, shards=original.shards[::-1], offset=original.offset + 512), moved)
    assert load_index(str(moved)).digest == original.digest


@pytest.mark.parametrize("column", ["label", "width", "height", "crc32"])
def test_the_digest_depends_on_every_label_size_and_image(dataset, column):
    original = load_index(f"{dataset}/train.parquet")
    values = getattr(original, column).copy()
    values[-1] += 1
    assert replace(original, **{column: values}).digest != original.digest


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"one.png": png(2, 2)}, r"needs an image .* and a \.cls label, or a \.json with one"),
        ({"one.cls": b"1"}, r"needs an image"),
        ({"one.png": png(2, 2), "one.json": b"[]"}, r"needs an image .* and a \.cls label"),
        ({"one.png": png(2, 2), "one.json": b"{"}, r"has a \.json that is not valid JSON"),
        ({"one.png": png(2, 2), "one.cls": b"2"}, r"has label 2, outside 0\.\.1"),
        ({"one.png": png(2, 2), "one.cls": b"-1"}, r"has label '-1', which is neither a number nor a class"),
        ({"one.png": png(2, 2), "one.cls": b"dgo"}, r"has label 'dgo', .* did you mean dog\?"),
    ],
)
def test_a_sample_that_cannot_be_indexed_is_named(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=rf"a\.tar: sample one {message}"):
        scan(str(tmp_path), ["a.tar"], ["cat", "dog"])


def test_an_image_that_cannot_be_read_is_indexed_without_a_size(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        {"one.jpg": b"nonsense", "one.cls": b"1", "two.png": png(3, 2), "two.cls": b"0", "no.png": b"", "no.cls": b"0"},
    )
    built = scan(str(tmp_path), ["a.tar"], ["cat", "dog"])
    assert built.width.tolist() == [0, 3, 0]
    assert built.height.tolist() == [0, 2, 0]
    assert built.size.tolist() == [8, len(png(3, 2)), 0]


def label_of(tmp_path, members, classes=None, **options):
    write_tar(tmp_path / "a.tar", {"one.png": png(2, 2), **members})
    return scan(str(tmp_path), ["a.tar"], classes, **options).label.tolist()


def test_labels_are_found_in_text_and_in_json(tmp_path):
    assert label_of(tmp_path, {"one.cls": b"3", "one.json": b'{"label": 4}'}) == [3]
    assert label_of(tmp_path, {"one.json": b'{"cls": 5, "label": 4}'}) == [4]
    assert label_of(tmp_path, {"one.json": b'{"cls": 5}'}) == [5]
    assert label_of(tmp_path, {"one.cls": b"3", "one.json": b'{"cls": 5, "kind": "6"}'}, label_key="kind") == [6]
    assert label_of(tmp_path, {"one.cls": b"dog"}, ["cat", "dog"]) == [1]


def test_a_missing_label_key_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.tar: sample one needs an image .* and a \.json with 'kind'"):
        label_of(tmp_path, {"one.cls": b"3", "one.json": b'{"label": 4}'}, label_key="kind")


def test_without_a_list_class_names_are_their_numbers(tmp_path):
    write_tar(tmp_path / "a.tar", {"one.png": png(2, 2), "one.cls": b"0", "two.png": png(2, 2), "two.cls": b"2"})
    assert scan(str(tmp_path), ["a.tar"]).classes == ("0", "1", "2")
    with pytest.raises(UserError, match="sample one has label 'cat', which is not a number; pass the list of classes"):
        label_of(tmp_path, {"one.cls": b"cat"})
    with pytest.raises(UserError, match=r"sample one has label 99999999999, outside"):
        label_of(tmp_path, {"one.cls": b"99999999999"})


def test_a_shard_that_is_missing_or_not_a_tar_is_named(tmp_path):
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    (tmp_path / "c.tar").mkdir()
    for name, reason in {"a": "file not found", "b": "bad checksum|invalid header", "c": "Is a directory"}.items():
        with pytest.raises(UserError, match=rf"{name}\.tar: shard cannot be read: .*({reason})"):
            scan(str(tmp_path), [f"{name}.tar"], ["cat"])
    with pytest.raises(UserError, match=r"a\.tar\.gz: compressed shards are not supported"):
        scan(str(tmp_path), ["a.tar.gz"], ["cat"])


@pytest.fixture
def three(tmp_path):
    """A shard of three samples: each member is a block of header and a block of data or two."""
    write_tar(
        tmp_path / "a.tar", {f"{key}.{kind}": data for key in "xyz" for kind, data in (("cls", b"0"), ("png", NOISE))}
    )
    return tmp_path


NOISE = png(2, 2) + bytes(512)


@pytest.mark.parametrize("length", [1, 511, 512, 700, 1024, 1600, 2000, 2560, 5000, 7680 - 512, 7680 - 1])
def test_a_shard_truncated_anywhere_is_named(three, length):
    whole = (three / "a.tar").read_bytes()
    (three / "a.tar").write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"a\.tar: (truncated|shard cannot be read)"):
        scan(str(three), ["a.tar"], ["cat"])


def test_a_shard_that_ends_inside_an_image_is_named_with_it(three):
    os.truncate(three / "a.tar", 3 * 512 + 100)
    with pytest.raises(UserError, match=r"a\.tar: truncated inside x\.png"):
        scan(str(three), ["a.tar"], ["cat"])


def test_a_shard_with_a_damaged_header_is_named_with_the_member_before_it(three):
    damaged = bytearray((three / "a.tar").read_bytes())
    damaged[2560 + 10] ^= 255  # in the header of the third member
    (three / "a.tar").write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.tar: truncated or damaged after x\.png"):
        scan(str(three), ["a.tar"], ["cat"])


def test_the_index_does_not_depend_on_the_number_of_workers(dataset, tmp_path):
    names = [shard.name for shard in load_index(f"{dataset}/train.parquet").shards]
    one, four = (scan(str(dataset), names, workers=workers) for workers in (1, 4))
    assert one.digest == four.digest
    assert one.shards == four.shards
    np.testing.assert_array_equal(one.offset, four.offset)


def test_scanning_holds_one_image_at_a_time(tmp_path):
    noise = png(2, 2) + bytes(1_000_000)
    write_tar(
        tmp_path / "a.tar",
        {f"{key}.{kind}": data for key in range(30) for kind, data in (("cls", b"0"), ("png", noise))},
    )
    tracemalloc.start()
    scan(str(tmp_path), ["a.tar"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000


def test_shards_lie_below_the_root_unless_their_names_are_absolute():
    def index_of(*names):
        each = {
            name: np.arange(len(names)) for name in ("shard", "offset", "size", "label", "width", "height", "crc32")
        }
        return Index("/r", tuple(Shard(name, 1, 0) for name in names), ("a", "b", "c"), **each)

    index = index_of("c.tar", "/x/a.tar", "http://h/b.tar")
    assert [index.location(shard) for shard in range(3)] == ["/r/c.tar", "/x/a.tar", "http://h/b.tar"]
    assert (len(index), index.remote) == (3, True)
    assert not index_of("c.tar", "/x/a.tar").remote


def test_an_index_without_samples_or_with_missing_labels_is_refused(dataset, tmp_path):
    table = pyarrow.parquet.read_table(f"{dataset}/train.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty\.parquet: the index has no samples"):
        load_index(f"{tmp_path}/empty.parquet")
    missing = pyarrow.array([None] * len(table), pyarrow.int32())
    column = table.schema.get_field_index("label")
    pyarrow.parquet.write_table(table.set_column(column, "label", missing), tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"null\.parquet: not an index"):
        load_index(f"{tmp_path}/null.parquet")


def test_a_file_that_is_not_an_index_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.parquet: index not found"):
        load_index(f"{tmp_path}/none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"bad\.parquet: not an index"):
        load_index(f"{tmp_path}/bad.parquet")


def test_the_index_of_imagenet_loads_and_takes_less_than_64_megabytes(tmp_path):
    numbers = np.arange(1_281_167)
    built = Index(
        root=str(tmp_path),
        shards=tuple(Shard(f"train-{number:06d}.tar", 250_000_000, number) for number in range(570)),
        classes=tuple(str(number) for number in range(1000)),
        shard=(numbers // 2248).astype(np.int32),
        offset=numbers * 110_000,
        size=(numbers % 200_003).astype(np.int32),
        label=(numbers % 1000).astype(np.int32),
        width=(numbers % 499 + 1).astype(np.int32),
        height=(numbers % 503 + 1).astype(np.int32),
        crc32=(numbers * 2_654_435_761 % 2**32).astype(np.uint32),
    )
    save_index(built, tmp_path / "i.parquet")
    tracemalloc.start()
    loaded = load_index(f"{tmp_path}/i.parquet")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.digest == built.digest
    assert (loaded.shards, loaded.classes) == (built.shards, built.classes)
    assert held < peak < 64e6


def test_reading_an_index_leaves_no_thread_that_waits_for_python_files(dataset):
    """Such a thread of Arrow's pool for input and output aborts the process at its exit now and then."""
    program = (
        "import os, sys, pyarrow, pyarrow.parquet\n"
        "from distrain.data.storage.index_file import load_index\n"
        "pyarrow.set_cpu_count(1)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "load_index(sys.argv[1])\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    command = [sys.executable, "-c", program, str(dataset / "train.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"  # the one that decodes
