"""Images are classified from the command line."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encoded

import distrain
from distrain.__main__ import main
from distrain.errors import UserError
from distrain.export.activation import activation_map, view
from distrain.export.classifier import Preprocess, read_image
from distrain.export.images import list_images, open_images


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.JPG", "b.jpeg", "more/ö #1.png")):
        (folder / name).write_bytes(encoded(number, "PNG" if name.endswith("png") else "JPEG", (20, 30)))
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict(monkeypatch, capsys, *arguments, stdin=""):
    monkeypatch.setattr("sys.argv", ["distrain", "predict", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    code = main()
    return code, capsys.readouterr()


def test_a_folder_is_classified_as_python_does(finished, photos, monkeypatch, capsys):
    code, printed = predict(monkeypatch, capsys, finished[1], photos, "--format", "jsonl", "--top", 3)
    assert code == 0
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["image"] for line in lines] == [f"{photos}/{name}" for name in ("a.JPG", "b.jpeg", "more/ö #1.png")]
    model = distrain.load(finished[1])
    for line in lines:
        scores = model(distrain.read_image(line["image"])).softmax(1)[0]
        assert dict(zip(line["classes"], line["scores"], strict=True)) == pytest.approx(
            dict(zip(model.classes, scores.tolist(), strict=True)), rel=1e-6
        )
        assert line["scores"] == sorted(line["scores"], reverse=True)


def test_bad_files_are_named_and_skipped_and_the_exit_code_says_so(finished, photos, monkeypatch, capsys):
    (photos / "broken.jpg").write_bytes(encoded(1)[:200])
    arguments = (finished[1], photos, photos / "missing.jpg", "--format", "csv", "--top", 1)
    code, printed = predict(monkeypatch, capsys, *arguments)
    assert code == 1
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert len(rows) == 3
    assert {row["class_1"] for row in rows} <= {"red", "green", "blue"}
    assert "broken.jpg: skipped: " in printed.err
    assert "missing.jpg: skipped: No such file or directory" in printed.err
    assert "Traceback" not in printed.err


def test_standard_input_and_patterns_name_images(finished, photos, monkeypatch, capsys):
    names = f"{photos}/a.JPG\n\n{photos}/more/ö #1.png\n"
    code, printed = predict(monkeypatch, capsys, finished[1], "-", stdin=names)
    assert code == 0
    assert [line.partition(": ")[0] for line in printed.out.splitlines()] == names.split("\n")[:1] + names.split("\n")[
        2:3
    ]
    assert list(list_images([f"{photos}/**/*.png"])) == [f"{photos}/more/ö #1.png"]


@pytest.mark.parametrize(
    ("argument", "message"), [("empty", "no images in this folder"), ("*.gif", "no file matches this pattern")]
)
def test_nothing_to_classify_is_one_line(argument, message, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        list(list_images([f"{tmp_path}/{argument}"]))


def test_a_sheet_shows_every_image_and_where_the_evidence_lies(finished, photos, monkeypatch, capsys, tmp_path):
    plain, cam = tmp_path / "plain.png", tmp_path / "cam.png"
    assert predict(monkeypatch, capsys, finished[1], photos, "--sheet", plain)[0] == 0
    assert predict(monkeypatch, capsys, finished[1], photos, "--sheet", cam, "--cam")[0] == 0
    first, second = (np.asarray(Image.open(path)) for path in (plain, cam))
    assert first.shape == second.shape
    assert first.shape[1] >= 3 * 96
    assert (first != second).any()


def test_the_mean_of_an_activation_map_is_the_logit(finished):
    model = distrain.load(finished[1])
    image = read_image(encoded(3, size=(20, 20)))
    maps = model.network.features(model.preprocess(image))
    evidence = torch.einsum("nchw,c->nhw", maps, model.network.head.weight[2])
    torch.testing.assert_close(evidence.mean() + model.network.head.bias[2], model(image)[0, 2])
    heat = activation_map(model, image, 2)
    assert heat.shape == (8, 8)
    assert (heat.min(), heat.max()) == (0, pytest.approx(1))


def test_the_view_of_an_image_of_the_right_size_is_the_image():
    from distrain.preprocessing import Preprocessing

    image = read_image(encoded(3, "PNG", size=(8, 8)))
    assert np.array_equal(view(Preprocess(Preprocessing(8, 8)), image), image[0].permute(1, 2, 0).numpy())


def test_downloads_that_fail_hide_their_password(monkeypatch):
    monkeypatch.setattr("distrain.export.images.TOOL_TIMEOUT", 0.2)
    from distrain.data.storage.retry import RetryPolicy

    monkeypatch.setattr("distrain.export.images.TOOL_POLICY", RetryPolicy(0, 0.0))
    (image,) = open_images(["http://user:hunter22@127.0.0.1:1/cat.jpg"])
    assert image.pixels is None
    assert "hunter22" not in image.name + image.problem
