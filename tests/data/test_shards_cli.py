"""The command line of `python -m distrain shards`."""

import re
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image
from s3fs import S3FileSystem
from support.images import encoded, write_tar
from support.servers import serve, serve_s3

from distrain import config
from distrain.__main__ import main
from distrain.data.index import COLUMNS, Index
from distrain.data.shards.patterns import expand
from distrain.data.storage import sequential
from distrain.data.storage.index_file import load_index, save_index


@pytest.fixture
def shards(monkeypatch, capsys):
    """Runs the tool and returns its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["distrain", "shards", *map(str, arguments)])
        code = main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_images_that_are_not_indexed_are_listed_and_so_are_classes_without_images(shards, tmp_path):
    members = [("a.jpg", encoded(0)), ("a.cls", b"0"), ("b.jpg", b"bad"), ("b.cls", b"2"), ("._a.jpg", b"mac")]
    write_tar(tmp_path / "a.tar", members)
    code, out, _ = shards("index", tmp_path / "a.tar", "--out", tmp_path / "i.parquet")
    assert code == 0
    assert out.splitlines()[1:] == [
        "1 of the images cannot be decoded; training will skip them:",
        "  a.tar: b.jpg: not a JPEG, PNG, WEBP image",
        f"1 images are not indexed: {tmp_path}/i.skipped.txt",
        "  a.tar: ._a.jpg: hidden, or in a folder of the operating system",
        "1 classes have no images: 1",
    ]
    assert (tmp_path / "i.skipped.txt").read_text().startswith("a.tar: ._a.jpg: hidden")


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


@pytest.fixture
def original(dataset):
    return load_index(f"{dataset}/train.parquet")


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (9, 7)).save(tmp_path / "photos" / name / "a.jpg")
    (tmp_path / "photos" / "dog" / "b.jpg").write_bytes(b"nonsense")
    return tmp_path / "photos"


def test_a_folder_becomes_shards_and_an_index(shards, photos, tmp_path):
    code, out, _ = shards("build", photos, "--out", tmp_path / "out", "--split", "val", "--workers", 2)
    assert code == 0
    assert f"{tmp_path}/out/val.parquet: 2 images, 2 classes, 1 shards, 10.2 kB" in out
    assert f"1 images could not be decoded and were excluded: {tmp_path}/out/val.unreadable.txt" in out
    assert "dog/b.jpg: not a JPEG" in out
    _, out, _ = shards("build", photos, "--out", tmp_path / "out", "--split", "val")
    assert "(1 reused)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "nowhere", "--out", "out"], "nowhere: file or folder not found"),
        (["build", "photos", "--out", "photos/cat/a.jpg"], "photos/cat/a.jpg: cannot be written: File exists"),
        (["build", "photos", "--out", "out", "--classes", "none.txt"], "none.txt: cannot be read: file not found"),
        (
            ["build", "photos", "--out", "out", "--classes", "twice.txt"],
            "twice.txt: class cat is listed more than once",
        ),
        (["build", "photos", "--out", "out", "--classes", "empty.txt"], "empty.txt: no class names found"),
        (["index", "no-*.tar", "--out", "i.parquet"], "no-*.tar: no file matches"),
        (["index", "no-{0..1.tar", "--out", "i.parquet"], "no-{0..1.tar: unbalanced braces"),
        (["index", "a.tar", "./a.tar", "--out", "i.parquet"], "a.tar: given more than once"),
        (["index", "a.tar", "--out", "no/i.parquet"], "no: folder not found"),
        (["index", "a.tar", "--out", "i.parquet"], "a.tar: shard cannot be read: file not found"),
        (["index", "b.tar", "--out", "photos"], "photos: cannot be written: Is a directory"),
        (["verify", "i.parquet"], "i.parquet: index not found"),
        (["show", "i.parquet"], "i.parquet: index not found"),
    ],
)
def test_a_mistake_is_one_line(shards, dataset, photos, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(dataset / "train-000000.tar", tmp_path / "b.tar")
    (tmp_path / "twice.txt").write_text("cat\ndog\ncat\n")
    (tmp_path / "empty.txt").write_text("\n")
    code, out, err = shards(*arguments)
    assert (code, out) == (78, "")
    assert err.startswith(f"distrain: {message}")
    assert err.count("\n") == 1


def test_patterns_expand_to_shards_in_order(tmp_path):
    for name in ("b-0.tar", "a-1.tar", "a-0.tar"):
        (tmp_path / name).touch()
    assert expand([f"{tmp_path}/{{b,a}}-*.tar"]) == [f"{tmp_path}/{name}.tar" for name in ("b-0", "a-0", "a-1")]
    assert expand(["s3://b/t-{000008..000010}.tar"]) == [f"s3://b/t-{number:06d}.tar" for number in (8, 9, 10)]


def test_brackets_and_braces_of_folders_that_exist_are_part_of_their_names(tmp_path):
    folder = tmp_path / "set [1] {a} #"
    folder.mkdir()
    for name in ("x-0.tar", "x-1.tar", "y[0].tar"):
        (folder / name).touch()
    assert (
        expand([f"{folder}/x-*.tar"]) == expand([f"{folder}/x-{{0,1}}.tar"]) == [f"{folder}/x-{n}.tar" for n in (0, 1)]
    )
    assert expand([f"{folder}/y[0].tar"]) == [f"{folder}/y[0].tar"]


def test_an_index_in_any_folder_finds_its_shards(shards, copy, tmp_path):
    (tmp_path / "apart").mkdir()
    for out in (copy / "i.parquet", tmp_path / "i.parquet", tmp_path / "apart" / "i.parquet"):
        assert shards("index", copy / "train-*.tar", "--out", out)[0] == 0
        loaded = load_index(str(out))
        assert loaded.digest == load_index(f"{copy}/train.parquet").digest
        assert shards("verify", out)[0] == 0
    assert load_index(f"{copy}/i.parquet").shards[0].name == "train-000000.tar"
    assert load_index(f"{tmp_path}/i.parquet").shards[0].name == "copy/train-000000.tar"
    assert load_index(f"{tmp_path}/apart/i.parquet").shards[0].name == f"{copy}/train-000000.tar"


def test_shards_on_a_web_server_are_read_once_each(shards, copy, original, tmp_path):
    with serve(copy) as server:
        pattern = f"{server.url}/train-{{000000..000004}}.tar"
        code, out, _ = shards("index", pattern, "--out", tmp_path / "i.parquet", "--workers", 3)
        assert code == 0
        assert "203 images, 3 classes, 5 shards" in out
        assert server.requests == {f"train-{number:06d}.tar": 1 for number in range(5)}
        loaded = load_index(f"{tmp_path}/i.parquet")
        assert loaded.digest == original.digest
        assert [shard[1:] for shard in loaded.shards] == [shard[1:] for shard in original.shards]
        assert shards("verify", tmp_path / "i.parquet")[0] == 0


def test_an_interrupted_download_is_retried(shards, copy, original, tmp_path, monkeypatch):
    monkeypatch.setattr(sequential.time, "sleep", lambda seconds: None)
    with serve(copy) as server:
        server.faults["train-000001.tar"] = ["truncate", 503]
        code, _, _ = shards("index", f"{server.url}/train-00000{{0,1}}.tar", "--out", tmp_path / "i.parquet")
        assert code == 0
        assert server.requests["train-000001.tar"] == 3


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, 78, "file not found"),
        (401, 78, "401, .*set or renew the credentials, which are looked for in the URL"),
        (403, 78, "403, .*set or renew the credentials, which are looked for in the URL"),
        (503, 1, r"503, .*; tried \d times in \d s; check the disk or the server and run again"),
    ],
)
def test_a_server_error_is_one_line(shards, copy, tmp_path, monkeypatch, status, code, reason):
    monkeypatch.setattr(sequential.time, "sleep", lambda seconds: None)
    with serve(copy) as server:
        server.faults["train-000000.tar"] = [status] * 9
        ended, _, err = shards("index", f"{server.url}/train-000000.tar", "--out", tmp_path / "i.parquet")
    assert ended == code
    assert re.fullmatch(rf"distrain: {server.url}/train-000000\.tar: shard cannot be read: .*{reason}.*\n", err)


def test_shards_in_a_bucket_are_found_by_pattern(shards, dataset, original, tmp_path, monkeypatch):
    S3FileSystem.clear_instance_cache()  # connected to other servers
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with serve_s3(dataset) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        code, _, _ = shards("index", "s3://shards/train-*.tar", "--out", tmp_path / "i.parquet")
        assert code == 0
        loaded = load_index(f"{tmp_path}/i.parquet")
        assert loaded.digest == original.digest
        assert loaded.shards[4].name == "s3://shards/train-000004.tar"
        assert shards("verify", tmp_path / "i.parquet")[0] == 0


def test_verify_accepts_intact_shards(shards, copy):
    code, out, _ = shards("verify", copy / "train.parquet", "--decode")
    assert code == 0
    assert "all 203 images in 5 shards match the index" in out


def test_verify_names_every_problem(shards, copy, original):
    content = bytearray((copy / "train-000001.tar").read_bytes())
    content[original.offset[50] + 20] ^= 255
    (copy / "train-000001.tar").write_bytes(content)
    (copy / "train-000002.tar").write_bytes((copy / "train-000002.tar").read_bytes()[: original.offset[83] + 5])
    (copy / "train-000003.tar").unlink()
    code, out, _ = shards("verify", copy / "train.parquet")
    lines = out.splitlines()
    assert code == 78
    assert lines[0].startswith("train-000001.tar: has checksum ")
    assert lines[1].startswith(f"train-000001.tar: sample 50: the {original.size[50]} bytes at offset ")
    assert lines[2].startswith("train-000002.tar: has ")
    assert lines[3] == "train-000002.tar: sample 83: extends past the end of the shard"
    assert "train-000003.tar: cannot be read: file not found" in lines
    assert lines[-1].endswith(f"{len(lines) - 1} problems")


def test_verify_with_decode_finds_images_that_do_not_decode(shards, photos, tmp_path):
    shards("build", photos, "--out", tmp_path / "out")
    path = f"{tmp_path}/out/train.parquet"
    built = load_index(path)
    columns = {name: getattr(built, name) for name in COLUMNS}
    cut = columns["size"] - 30
    with open(built.location(0), "rb") as file:  # noqa: PTH123
        stored = file.read()
    checksums = [
        np.uint32(zlib.crc32(stored[start : start + size])) for start, size in zip(columns["offset"], cut, strict=True)
    ]
    columns |= {"size": cut, "crc32": np.array(checksums)}
    save_index(Index(built.root, built.shards, built.classes, **columns), path)
    assert shards("verify", path)[0] == 0
    code, out, _ = shards("verify", path, "--decode")
    assert code == 78
    assert "train-000000.tar: sample 0: cannot be decoded: " in out


def test_show_prints_the_contents_of_the_index(shards, dataset, original):
    code, out, _ = shards("show", dataset / "train.parquet")
    assert code == 0
    assert "203 images, 3 classes, 5 shards" in out
    for name, count in zip(original.classes, np.bincount(original.label), strict=True):
        assert f"{name:<5} {count:>9} █" in out
    assert "shards: " in out
    assert "40 to 41 images" in out


def test_show_summarizes_many_classes_and_unreadable_images(shards, original, tmp_path):
    columns = {name: getattr(original, name) for name in COLUMNS}
    columns |= {"label": np.arange(203, dtype=np.int32) // 2, "width": original.width * (np.arange(203) > 6)}
    classes = tuple(f"class{number}" for number in range(110))
    save_index(Index(original.root, original.shards, classes, **columns), tmp_path / "i.parquet")
    _, out, _ = shards("show", tmp_path / "i.parquet")
    assert "7 of the images could not be decoded" in out
    assert "images per class: 0 to 2, median 2; 8 classes have none" in out
    assert "fewest: class102 0, class103 0" in out
    assert "most: class100 2" in out


def test_the_sheet_skips_bad_samples_as_training_does(shards, original, copy):
    few = Index(**{**vars(original), "root": str(copy), "width": original.width * (np.arange(203) % 4 == 0)})
    save_index(few, copy / "few.parquet")
    code, _, err = shards("show", copy / "few.parquet", "--sheet", copy / "s.png", "--samples", 6)
    assert (code, err) == (0, "")
    assert Image.open(copy / "s.png").width > 0


def test_the_sheet_shows_what_training_will_see(shards, dataset, tmp_path):
    from contextlib import closing

    import torch

    from distrain.data.loading.requests import train_requests
    from distrain.data.loading.setup import make_loader, make_plan, make_quarantine

    (tmp_path / "run.yaml").write_text(
        f"run: {{name: a, dir: {tmp_path}, seed: 5}}\nmodel: {{name: regnety_400mf, num_classes: 3}}\n"
        f"data: {{train: {dataset}/train.parquet, val: {dataset}/val.parquet, image_size: 8, val_resize: 8"
        "}\naugment: {crop: pad, crop_pad: 2}\nbatch: {lanes: 1, per_lane: 6}\n"
    )
    sheet, settings = tmp_path / "s.png", tmp_path / "run.yaml"
    code, _, _ = shards("show", dataset / "train.parquet", "--sheet", sheet, "--samples", 6, "--config", settings)
    assert code == 0
    drawn = np.asarray(Image.open(sheet))

    loaded = load_index(f"{dataset}/train.parquet")
    run = config.load(settings)
    requests = train_requests(run, make_plan(run, loaded), loaded, range(1))
    loader = make_loader(run, "torch", loaded, make_quarantine(run, loaded, "train"), torch.device("cpu"))
    with closing(loader):
        images = next(loader.stream(requests)).images.permute(0, 2, 3, 1).numpy()
    side, caption = 96, 16
    assert drawn.shape == (2 * (side + 4 + caption) + 4, 3 * (side + 4) + 4, 3)
    for number in range(6):
        left, top = 4 + number % 3 * (side + 4), 4 + number // 3 * (side + 4 + caption)
        np.testing.assert_array_equal(drawn[top : top + side : 12, left : left + side : 12], images[number])


def test_a_password_in_a_url_is_neither_printed_nor_listed(shards, tmp_path):
    members = [("a.jpg", encoded(0)), ("a.cls", b"0"), ("b.jpg", b"bad"), ("b.cls", b"0"), ("._a.jpg", b"mac")]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "copy.tar", members)
    index = tmp_path / "i.parquet"
    with serve(tmp_path) as server:
        urls = [f"http://ada:hunter42@{server.url.removeprefix('http://')}/{name}.tar" for name in ("a", "copy")]
        printed = [shards("index", *urls, "--out", index)]
        printed += [shards("show", index)]
        write_tar(tmp_path / "a.tar", members[2:])
        printed += [shards("verify", index)]
    assert [code for code, _, _ in printed] == [0, 0, 78]
    assert f"{index}: holds the passwords or tokens of its URLs, so that only you can read it" in printed[0][1]
    assert index.stat().st_mode & 0o777 == 0o600
    for _, out, err in printed:
        assert "http://***@" in out
        assert "hunter42" not in out + err
    listed = (tmp_path / "i.skipped.txt").read_text()
    assert "http://***@" in listed
    assert "hunter42" not in listed
