"""Every image of a tar is in the index, or named with the reason, or the tar is refused."""

import io
import os
import tarfile

import pytest
from support.images import encoded, write_tar

from distrain.data.shards.scan import Notes, scan
from distrain.errors import UserError

JPG = encoded(0)


def index_of(folder, members, notes=None):
    """The index of a tar with these members and a complete sample."""
    write_tar(folder / "a.tar", [("ok.jpg", encoded(9)), ("ok.cls", b"0"), *members])
    return scan(str(folder), ["a.tar"], notes=notes)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["0.jpg", "0.cls", "0.jpg", "0.cls"], r"two members 0\.jpg have the same key 0, so one would be lost"),
        (["0.jpg", "0.cls", "0.png"], r"0\.jpg and 0\.png have the same key 0, so one would be lost"),
        (["0.jpg", "0.cls", "0.JPG"], r"0\.jpg and 0\.JPG have the same key 0, so one would be lost"),
        (["a.1.jpg", "a.1.cls"], r"image a\.1\.jpg would be lost: .* ends at the first dot .*; rename it"),
        (["a.jpg", "a.cls", "a.1.jpg", "a.1.cls"], r"image a\.1\.jpg would be lost: .* first dot"),
        (["x.gif"], r"image x\.gif would be lost: its suffix is not one of \.jpg, .*; rename it, or convert it"),
        (["d/x.tiff", "d/x.cls"], r"image d/x\.tiff would be lost: its suffix is not one of"),
        (["x"], "image x would be lost: its suffix is not one of"),
        (["x.bin", "x.cls"], r"image x\.bin would be lost: its suffix is not one of"),
        (["x.jpg"], r"sample x needs an image .* and a \.cls label"),
    ],
)
def test_an_image_that_would_be_lost_is_named(tmp_path, members, message):
    with pytest.raises(UserError, match=rf"^a\.tar: {message}"):
        index_of(tmp_path, [(name, b"0" if name.endswith(".cls") else JPG) for name in members])


def test_images_that_are_not_samples_are_named_with_the_reason(tmp_path):
    notes = Notes()
    hidden, further = ["._x.jpg", "__MACOSX/x.jpg", "@eaDir/y/thumb.jpg"], ["ok.mask.png", "ok.thumbnail"]
    images = [(name, JPG) for name in (*hidden, *further)]
    assert len(index_of(tmp_path, [*images, ("ok.txt", b"a caption"), (".DS_Store", b"junk")], notes)) == 1
    assert notes.skipped == [
        *((f"a.tar: {name}", "hidden, or in a folder of the operating system") for name in hidden),
        *((f"a.tar: {name}", "a further image of sample ok") for name in further),
    ]


def test_the_same_name_in_two_folders_is_two_samples(tmp_path):
    members = [("a/x.JPEG", JPG), ("a/x.cls", b"1"), ("b/x.JPEG", JPG), ("b/x.cls", b"2")]
    assert index_of(tmp_path, members).label.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("kind", "what"), [(tarfile.LNKTYPE, "a link"), (tarfile.SYMTYPE, "a link"), (tarfile.FIFOTYPE, "a device or pipe")]
)
@pytest.mark.parametrize("name", ["x.jpg", "x.cls"])
def test_a_member_that_is_no_stored_file_is_named(tmp_path, kind, what, name):
    index_of(tmp_path, [])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "ok.jpg"
        tar.addfile(member)
    with pytest.raises(UserError, match=rf"a\.tar: {name} is {what}, not a stored file; write the shard again"):
        scan(str(tmp_path), ["a.tar"])


def test_a_sparse_member_is_named(tmp_path):
    member = tarfile.TarInfo("x.jpg")
    member.pax_headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": "900"}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member.size = 5
        tar.addfile(member, io.BytesIO(b"12345"))
    with pytest.raises(UserError, match=r"a\.tar: x\.jpg is a sparse file, not a stored file; .* without --sparse"):
        scan(str(tmp_path), ["a.tar"])


@pytest.mark.parametrize("appended", ["tar", "garbage", "after one block"])
def test_data_after_the_end_of_a_tar_is_refused(tmp_path, appended):
    index_of(tmp_path, [])
    whole = (tmp_path / "a.tar").read_bytes()
    end = whole.rindex(b"0" + bytes(511)) + 512
    content = {"tar": whole + whole, "garbage": whole + b"x", "after one block": whole[:end] + bytes(512) + whole}
    (tmp_path / "a.tar").write_bytes(content[appended])
    with pytest.raises(UserError, match=r"a\.tar: holds more data after the end .* write it again as one tar"):
        scan(str(tmp_path), ["a.tar"])


def test_shards_without_samples_and_with_the_same_content_are_noted(tmp_path):
    index_of(tmp_path, [])
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "c.tar").write_bytes(bytes(10_240))
    notes = Notes()
    assert len(scan(str(tmp_path), ["a.tar", "b.tar", "c.tar"], notes=notes)) == 2
    assert notes.empty == ["c.tar"]
    assert notes.copies == [("a.tar", "b.tar")]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar: shard cannot be read: not a regular file"):
        scan(str(tmp_path), ["a.tar"])
