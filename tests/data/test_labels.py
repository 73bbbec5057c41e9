"""Labels are names or numbers, never both; class names are equal however they are typed."""

import unicodedata

import pytest
from support.images import encoded, write_tar

from distrain.data.shards.labels import read_classes, read_column
from distrain.data.shards.scan import scan
from distrain.data.shards.sources import find
from distrain.errors import UserError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


def labels_of(texts, classes=None, kind="auto"):
    labels, names, _ = read_column(
        [(f"line {number}", text) for number, text in enumerate(texts, 1)], classes, kind, "x"
    )
    return labels.tolist(), names


def test_a_column_with_one_name_has_only_names():
    assert labels_of(["1", "2", "A", "B", "2"]) == ([0, 1, 2, 3, 1], ["1", "2", "A", "B"])
    assert labels_of(["10", "2", "0"]) == ([10, 2, 0], [str(number) for number in range(11)])


def test_names_that_are_numbers_are_names_where_they_are_all_the_classes():
    assert labels_of(["1", "2", "3"], ["1", "2", "3"])[0] == [0, 1, 2]
    assert labels_of(["1", "2", "A"], ["1", "2", "A", "B"])[0] == [0, 1, 2]
    assert labels_of(["2", "1", "2"], ["1", "2"])[0] == [1, 0, 1]


def test_numbers_are_numbers_where_no_class_is_called_otherwise():
    assert labels_of(["1", "0"], ["cat", "dog"])[0] == [1, 0]
    assert labels_of(["1", "0"], ["0", "1", "2"])[0] == [1, 0]


@pytest.mark.parametrize("texts", [["1", "2"], ["0", "1", "2"]])
def test_labels_that_could_be_both_need_a_flag(texts):
    with pytest.raises(
        UserError, match=r"x: label 1 could be number 1 of --classes, '2', or the class called '1': pass"
    ):
        labels_of(texts, ["1", "2", "3"])
    assert labels_of(texts, ["1", "2", "3"], "numbers")[0] == list(map(int, texts))


def test_the_flag_makes_names_of_numbers():
    assert labels_of(["1", "2"], ["1", "2", "3"], "names")[0] == [0, 1]
    assert labels_of(["7", "007"], None, "names") == ([1, 0], ["007", "7"])


@pytest.mark.parametrize("odd", ["-1", "1.0", "٣", "1e3", "+2", "nan"])
def test_what_looks_like_a_number_and_is_none_is_refused_among_numbers(odd):
    with pytest.raises(
        UserError, match=r"line 2 has label .*, which is not a number from 0: correct it, or pass --labels"
    ):
        labels_of(["0", odd, "1"])


@pytest.mark.parametrize(
    ("texts", "classes", "message"),
    [
        (["1", "007"], None, "line 2 has label '007', which could be a number or a name"),
        (["a", " 3"], None, "line 2 has label ' 3'; remove the spaces"),
        (["Cat", "cat"], None, "classes Cat and cat differ only in upper and lower case"),
        (
            ["cat", "1"],
            ["cat", "dog"],
            "x: labels are names and numbers, such as 'cat' and 1, and no class is called '1'",
        ),
        (["-1"], ["cat"], "line 1 has label '-1', which is neither a number nor a class"),
        (["9" * 5000], ["cat"], r"line 1 has label 99999999999999999999\.\.\., outside 0\.\.0"),
    ],
)
def test_a_doubtful_label_is_one_line(texts, classes, message):
    with pytest.raises(UserError, match=message):
        labels_of(texts, classes)


def test_accents_are_equal_in_both_unicode_forms():
    assert labels_of([DECOMPOSED, "Tee", COMPOSED]) == ([0, 1, 0], [COMPOSED, "Tee"])
    assert labels_of([DECOMPOSED], ["Tee", COMPOSED])[0] == [1]


def index_of(folder, labels, classes=None, suffix="cls", **options):
    members = [(f"{number}.jpg", encoded(number)) for number in range(len(labels))]
    write_tar(folder / "a.tar", [*members, *((f"{number}.{suffix}", text) for number, text in enumerate(labels))])
    return scan(str(folder), ["a.tar"], classes, **options)


def test_the_names_of_a_class_list_are_the_labels_of_shards(tmp_path):
    built = index_of(tmp_path, [b"1", b"1", b"2", b"2", b"A", b"B"], ["1", "2", "A", "B"])
    assert built.label.tolist() == [0, 0, 1, 1, 2, 3]
    with pytest.raises(UserError, match=r"label 1 could be number 1 of --classes, '2', or the class called '1'"):
        index_of(tmp_path, [b"1"], ["1", "2"])
    assert index_of(tmp_path, [b"1"], ["1", "2"], kind="numbers").label.tolist() == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"label": null}', "has a .json whose 'label' is neither an integer nor text"),
        (b'{"label": true}', "has a .json whose 'label' is neither an integer nor text"),
        (b'{"label": 1.0}', "has a .json whose 'label' is neither an integer nor text"),
        (b'{"label": -1}', "has label '-1', which is not a number"),
        (b'{"label": " 3"}', "has label ' 3', which is not a number"),
        (b'{"label": 1, "label": 2}', "has a .json with 'label' twice"),
        (b"[" * 100_000, "has a .json that is not valid JSON"),
    ],
)
def test_a_label_in_json_that_is_no_label_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"a\.tar: sample 0 {message}"):
        index_of(tmp_path, [content], suffix="json")


@pytest.mark.parametrize("text", [b"", b"-1", b"1.0", "٣".encode(), b"1 2"])
def test_a_label_in_text_that_is_no_number_is_named(tmp_path, text):
    with pytest.raises(UserError, match=r"a\.tar: sample 0 has label '.*', which is not a number"):
        index_of(tmp_path, [text])


def test_a_class_list_may_have_a_byte_order_mark_and_end_in_blank_lines(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + f"{DECOMPOSED}\r\nTee\r\n\r\n".encode())
    assert read_classes(tmp_path / "c.txt") == [COMPOSED, "Tee"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("zero\n\ntwo\n", "line 2 is blank; delete it, or write the name of class 1"),
        ("\nzero\n", "line 1 is blank"),
        (f"{COMPOSED}\nTee\n{DECOMPOSED}\n", "class Café is listed more than once, in lines 1 and 3"),
        ("a\u200b\nb\n", r"line 1 has invisible characters: 'a\\u200b'"),
        ("\n\n", "no class names found"),
    ],
)
def test_a_class_list_is_never_renumbered(tmp_path, content, message):
    (tmp_path / "c.txt").write_text(content)
    with pytest.raises(UserError, match=rf"c\.txt: {message}"):
        read_classes(tmp_path / "c.txt")


def test_a_class_list_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "c.txt").write_bytes("Café\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"c\.txt: not UTF-8 text at byte 0; save it as UTF-8"):
        read_classes(tmp_path / "c.txt")


@pytest.mark.parametrize("name", ["cat\u200b", "cat\u00a0", "hot\ndog"])
def test_names_that_only_look_equal_are_not_two_classes(tmp_path, name):
    for entry in ("cat", name):
        (tmp_path / "set" / entry).mkdir(parents=True)
        (tmp_path / "set" / entry / "0.jpg").write_bytes(encoded(0))
    with pytest.raises(UserError, match=r"set: the name of class folder '.*' has spaces around it or invisible"):
        find(tmp_path / "set", "train")
    (tmp_path / "a.csv").write_text(f'path,label\nset/cat/0.jpg,cat\nset/cat/0.jpg,"x{name}x"\n')
    with pytest.raises(UserError, match=r"a\.csv: line \d has invisible characters in label 'x.*x'; delete them"):
        find(tmp_path / "a.csv", "train")
