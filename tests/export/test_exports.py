"""Classifiers are loaded, and written for other libraries and runtimes."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from support.images import encoded
from torch.nn.functional import interpolate

import distrain
from distrain.errors import UserError
from distrain.export import cli
from distrain.export.classifier import Classifier, Preprocess
from distrain.export.load import Program, load
from distrain.export.writers import export, fold_batch_norm
from distrain.models import build, save_weights
from distrain.preprocessing import Preprocessing

CLASSES = ["red", "green", "blue"]
RECORD = {"network": "densenet_bc_10_4", "options": {}}


def with_statistics(network):
    """Give a network running statistics as training does, so that folding and exporting them matters."""
    for _ in range(5):
        network.train()(torch.randn(8, 3, 32, 32) + 0.5)
    return network.eval()


def tiny(seed=0):
    torch.manual_seed(seed)
    network = with_statistics(build("densenet_bc_10_4", 3))
    return Classifier(network, Preprocessing(10, 8), CLASSES, RECORD)


@pytest.fixture(scope="module")
def classifier():
    return tiny()


@pytest.fixture(scope="module")
def images():
    return [torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8) for size in ((8, 8), (30, 41), (64, 9))]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(30, 41), (7, 50), (64, 9), (8, 8)])
def test_preprocessing_equals_crop_and_antialiased_resizing(size, interpolation):
    settings = Preprocessing(10, 8, interpolation)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    side = max(1, round(min(size) * 8 / 10))
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = images[:, :, top : top + side, left : left + side].float()
    pixels = interpolate(cropped, (8, 8), mode=interpolation, antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    torch.testing.assert_close(Preprocess(settings)(images), (pixels - mean) / std, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("target", ["safetensors", "torch_export", "onnx", "mlflow"])
def test_what_is_exported_gives_the_same_logits_and_says_what_it_is(target, classifier, images, tmp_path):
    path = tmp_path / f"model{cli.TARGETS[target]}"
    assert export(classifier, target, path, images) < 1e-6
    files = {"safetensors": path, "mlflow": path / "artifacts" / "weights.safetensors"}
    model = load(files[target]) if target in files else Program(path)
    for image in images:
        torch.testing.assert_close(model(image), classifier(image), rtol=1e-5, atol=1e-6)
    batch = torch.cat([images[1], images[1].flip(-1), images[1]])
    torch.testing.assert_close(model(batch), classifier(batch), rtol=1e-5, atol=1e-6)
    assert model.classes == tuple(CLASSES)
    assert model.preprocessing == classifier.preprocessing
    assert model.record["network"] == "densenet_bc_10_4"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["densenet_bc_10_4", "regnety_200mf"])
def test_folding_keeps_the_logits_and_removes_normalizations(name):
    network = with_statistics(build(name, 3))
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    before = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    folded = fold_batch_norm(network)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()) == before - folded
    assert folded == (before if name.startswith("regnet") else 3)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def by_torchvision(name):
    return torchvision.models.get_model(name, weights=None, num_classes=10)


LIBRARIES = [
    ("torchvision", "densenet121", {}, by_torchvision, "densenet121"),
    ("torchvision", "regnety_400mf", {"width_rule": "torchvision"}, by_torchvision, "regnet_y_400mf"),
    ("timm", "regnety_400mf", {}, lambda name: timm.create_model(name, num_classes=10), "regnety_004"),
]


@pytest.mark.parametrize(("library", "network", "options", "make", "name"), LIBRARIES)
def test_weights_of_other_libraries_go_in_and_out(library, network, options, make, name, tmp_path):
    torch.manual_seed(0)
    reference = make(name).eval()
    torch.save(reference.state_dict(), tmp_path / "theirs.pth")
    inputs = torch.randn(2, 3, 64, 64)
    ours = load(tmp_path / "theirs.pth", network, options)
    torch.testing.assert_close(ours.network(inputs), reference(inputs), rtol=1e-5, atol=1e-5)
    images = [torch.randint(0, 256, (1, 3, 90, 70), dtype=torch.uint8)]
    assert export(ours, library, tmp_path / "ours.pth", images) <= 1e-5
    again = make(name).eval()
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    torch.testing.assert_close(again(inputs), reference(inputs), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch_export", "onnx"])
@pytest.mark.parametrize(("library", "network", "options", "make", "name"), LIBRARIES)
def test_programs_of_other_libraries_networks(target, library, network, options, make, name, tmp_path):
    torch.manual_seed(0)
    torch.save(make(name).state_dict(), tmp_path / "theirs.pth")
    ours = load(tmp_path / "theirs.pth", network, options)
    program = tmp_path / f"ours{cli.TARGETS[target]}"
    shapes = [(1, 3, 300, 400), (1, 3, 240, 200)]
    images = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    assert export(ours, target, program, images) <= 1e-4
    torch.testing.assert_close(Program(program)(images[0]), ours(images[0]), rtol=0, atol=1e-4)


def test_a_run_loads_in_three_lines_with_its_class_names(finished, tmp_path):
    (tmp_path / "image.png").write_bytes(encoded(1, "PNG", (30, 20)))
    model = distrain.load(finished[1])
    scores = model(distrain.read_image(tmp_path / "image.png")).softmax(1)
    assert model.classes == ("red", "green", "blue")
    assert scores.shape == (1, 3)
    assert model.preprocessing.crop == 8
    raw = distrain.load(f"{finished[1]}:last:raw")
    assert not torch.equal(raw.network.head.weight, model.network.head.weight)  # the default is the EMA


def test_a_file_that_does_not_say_its_network_needs_a_name(classifier, tmp_path):
    save_weights(classifier.network, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"plain.safetensors: does not say of which network it is"):
        load(tmp_path / "plain.safetensors")
    assert load(tmp_path / "plain.safetensors", "densenet_bc_10_4", classes=CLASSES).classes == tuple(CLASSES)
    with pytest.raises(UserError, match="has 3 classes, and 2 names are given"):
        load(tmp_path / "plain.safetensors", "densenet_bc_10_4", classes=CLASSES[:2])


def test_other_logits_are_not_exported(classifier, images, tmp_path):
    with pytest.raises(UserError, match=r"model.onnx: not written: onnx gives other logits"):
        export(classifier, "onnx", tmp_path / "model.onnx", images, reference=tiny(seed=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["safetensors", "onnx", "mlflow"])
def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(target, classifier, images, tmp_path):
    path = tmp_path / "missing" / "model"
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        export(classifier, target, path, images)


def test_a_network_that_the_library_has_not_is_written_by_its_names_and_read_back(classifier, images, tmp_path):
    assert export(classifier, "torchvision", tmp_path / "model.pth", images) == 0
    assert "features.conv0.weight" in torch.load(tmp_path / "model.pth", weights_only=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", b"", "not a readable ONNX file"),
        ("model.pt2", b"", "not a readable program of torch.export"),
        ("model.onnx", None, "model.onnx: not found"),
        ("model.pt2", None, "model.pt2: cannot be read: No such file"),
    ],
)
def test_a_program_that_cannot_be_read_is_one_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Program(tmp_path / name)
    assert "\n" not in str(error.value)


class Harmful:
    def __reduce__(self):
        return (Path("/tmp/distrain-was-executed").touch, ())


def test_nothing_pickled_in_a_program_is_executed(classifier, images, tmp_path):
    path, harmful = tmp_path / "model.pt2", tmp_path / "harmful.pt2"
    export(classifier, "torch_export", path, images)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(harmful, "w") as other:
        names = archive.namelist()
        for name in names:
            is_pickle = "sample_inputs" in name or name.endswith((".pkl", ".pt"))
            other.writestr(name, pickle.dumps(Harmful()) if is_pickle else archive.read(name))
        other.writestr(f"{names[0].split('/')[0]}/data/constants/custom_obj_0", pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="holds pickled objects, which are not loaded"):
        Program(harmful)
    assert not Path("/tmp/distrain-was-executed").exists()


def test_the_tool_exports_the_best_checkpoint_with_real_images(finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(encoded(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["distrain", "export", str(finished[1]), "--to", "onnx", "--fold", "--images", "photo.jpg"]
    )
    from distrain.__main__ import main

    assert main() == 0
    assert "folded 3 BatchNorms" in (output := capsys.readouterr().out)
    assert "run.onnx: " in output
    assert "on 1 images logits differ by" in output
    record = json.loads(json.dumps(Program(tmp_path / "run.onnx").record))
    assert record["weights"].startswith(f"{finished[1]}:")
