"""Lists of images as sources of shards."""

import pytest
from support.images import encoded

from distrain.data.shards.sources import find
from distrain.errors import UserError


@pytest.fixture
def listing(tmp_path):
    """Writes a list next to the images a.jpg and b.jpg and returns its path."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(encoded(number))

    def write(text):
        (tmp_path / "list.csv").write_text(text)
        return tmp_path / "list.csv"

    return write


def test_labels_of_a_list_can_be_names(listing):
    found = find(listing("label,path,note\ntiger,a.jpg,x\n\nbear,b.jpg,y\n"), "train")
    assert found.classes == ("bear", "tiger")
    assert found.label.tolist() == [1, 0]
    assert [found.read(image) for image in (0, 1)] == [encoded(0), encoded(1)]


def test_labels_of_a_list_can_be_numbers(listing):
    found = find(listing("path,label\na.jpg,2\nb.jpg,0\n"), "train")
    assert found.classes == ("0", "1", "2")
    assert found.label.tolist() == [2, 0]


def test_a_given_order_of_classes_defines_the_labels_of_a_list(listing):
    found = find(listing("path,label\na.jpg,tiger\nb.jpg,bear\n"), "train", ["tiger", "lion", "bear"])
    assert found.label.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 must be a header with the columns path,label"),
        (
            "path,class\na.jpg,1\n",
            r"line 1 must be .* path,label \(label is missing; found 'path,class'\)",
        ),
        ("path,label\n", "lists no images"),
        ("path,label\na.jpg,1\nb.jpg\n", "line 3 needs a path and a label"),
        ("path,label\na.jpg,1\n,1\n", "line 3 needs a path and a label"),
        ("path,label\na.jpg,tiger\nc.jpg,tiger\n", r"line 3: c\.jpg: file not found"),
        ("path,label\na.jpg,tiger\nb.jpg,tigr\n", "line 3 has label 'tigr', .* did you mean tiger"),
        ("path,label\na.jpg,tiger\nb.jpg,7\n", r"line 3 has label 7, outside 0\.\.1"),
        ("path,label\na.jpg,tiger\na.jpg,bear\n", "line 3 has label bear for a.jpg, but line 2 has label tiger"),
        ("path,label\na.jpg,tiger\n./a.jpg,bear\n", r"line 3 has label bear for \./a\.jpg, but line 2"),
        ("path,label\na.jpg,bear,x\n", "line 2 has more columns than the header; quote a path"),
        ('path,label\n"a.jpg,bear\nb.jpg,bear\n', "line 2: a quote is not closed"),
        ("path,label\na.jpg, bear\n", "line 2 has label ' bear'; remove the spaces"),
        ("path,label\na.jpg ,bear\n", r"line 2: 'a\.jpg ': file not found"),
        ("path,label,label\na.jpg,bear,tiger\n", r"line 1 must be .* \(label is there twice"),
        ("path,label\n.,bear\n", "line 2: .: not a regular file"),
    ],
)
def test_an_error_in_a_list_names_its_line(listing, text, message):
    with pytest.raises(UserError, match=rf"list\.csv: {message}"):
        find(listing(text), "train", ["tiger", "bear"])


def test_a_source_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: file or folder not found"):
        find(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="has no sub-folders"):
        find(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"contains the splits train, not classes; pass one, such as .*/train"):
        find(tmp_path, "train")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="its 2 class folders contain no files"):
        find(tmp_path, "train", insist=True)
    with pytest.raises(UserError, match="cat: not a known class: did you mean cats"):
        find(tmp_path, "train", ["cats", "train"])
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"neither a folder nor a \.csv, \.tsv or \.tar"):
        find(tmp_path / "a.zip", "train")


def test_an_image_that_is_listed_again_with_its_label_is_reported(listing):
    lines = []
    found = find(listing("path,label\na.jpg,x\nb.jpg,y\na.jpg,x\n"), "train", info=lines.append)
    assert found.label.tolist() == [0, 1, 0]
    (line,) = lines
    assert line.endswith("list.csv: line 4: a.jpg is listed again; 1 lines repeat an image, which is used as often")


def test_a_list_that_is_not_utf_8_is_one_line(listing):
    path = listing("")
    path.write_bytes("path,label\na.jpg,Café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"list\.csv: not UTF-8 text .*; save it as UTF-8"):
        find(path, "train")
