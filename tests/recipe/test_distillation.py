"""Distillation: the loss, and which answers of which teacher go into it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distrain import config
from distrain.config import Config
from distrain.data.loading.setup import load_indexes
from distrain.errors import UserError
from distrain.export.classifier import Classifier
from distrain.export.load import load
from distrain.export.writers import export
from distrain.models import build
from distrain.preprocessing import Preprocessing
from distrain.recipe.distillation import Distillation, Teacher, open_teacher

CPU = torch.device("cpu")
SETTINGS = ("run.name=student", "data.train=t", "data.val=v", "model.name=densenet121", "train.precision=fp32")
PREPROCESSING = Preprocessing(8, 8, "bilinear", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.fixture
def classifier():
    """One of four classes, with statistics that are not those of a batch."""
    network = build("densenet_bc_22_12", 4)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
    return Classifier(network, PREPROCESSING, ("a", "b", "c", "d"), {"sha256": "5ac1"})


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)


def distillation(teacher: Teacher, *words: str) -> Distillation:
    return Distillation(config.load(None, [*SETTINGS, *words]), teacher, CPU)


def test_the_loss_is_the_formula_of_hinton(classifier, images):
    teacher = Teacher(classifier, (0, 1, 2, 3), "")
    logits, loss = torch.randn(5, 4, requires_grad=True), torch.tensor(2.0)
    found = distillation(teacher, "distill.weight=0.3", "distill.temperature=4")(loss, logits, images)

    p, q = (classifier(images) / 4).softmax(1), (logits / 4).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(found, 0.7 * loss + 0.3 * 16 * divergence)
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient, 0.3 * 4 * (q - p) / 5, rtol=1e-4, atol=1e-7)  # section 2, equation 2
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_at_temperature_1_it_is_learning_from_soft_labels(classifier, images):
    teacher, logits = Teacher(classifier, (0, 1, 2, 3), ""), torch.randn(5, 4)
    answers = classifier(images).softmax(1)
    entropy = -(answers * answers.log()).sum(1).mean()
    found = distillation(teacher, "distill.weight=1")(torch.tensor(9.0), logits, images)
    torch.testing.assert_close(found + entropy, F.cross_entropy(logits, answers))


def test_answers_are_put_in_the_order_of_the_data(classifier, images):
    logits, loss = torch.randn(5, 3), torch.tensor(1.0)
    found = distillation(Teacher(classifier, (2, 0, 3), ""), "distill.weight=1")(loss, logits, images)
    answers = classifier(images)[:, [2, 0, 3]].log_softmax(1)
    torch.testing.assert_close(found, F.kl_div(logits.log_softmax(1), answers, reduction="batchmean", log_target=True))


def test_a_mixed_image_is_answered_as_it_is(classifier, images):
    teacher, logits, loss = Teacher(classifier, (0, 1, 2, 3), ""), torch.randn(5, 4), torch.tensor(1.0)
    mixed = 0.5 * images.float() + 0.5 * images.roll(1, 0).float()
    distill = distillation(teacher, "distill.weight=1")
    answers = classifier(mixed).log_softmax(1)
    expected = F.kl_div(logits.log_softmax(1), answers, reduction="batchmean", log_target=True)
    torch.testing.assert_close(distill(loss, logits, mixed), expected)


def test_an_exported_program_teaches_like_its_classifier(finished, on_dataset, tmp_path, images):
    source = f"{finished[1]}:ema"
    export(load(source), "torch_export", tmp_path / "teacher.pt2", [images[:1]])
    teachers = []
    for text in (source, str(tmp_path / "teacher.pt2")):
        settings = student(on_dataset, f"distill.teacher={text}")
        teachers.append(open_teacher(settings, load_indexes(settings)[0]))
    logits, loss = torch.randn(5, 3), torch.tensor(1.0)
    by_network, by_program = (distillation(teacher)(loss, logits, images) for teacher in teachers)
    torch.testing.assert_close(by_network, by_program, rtol=1e-3, atol=1e-5)
    assert "" != teachers[0].sha256 != teachers[1].sha256 != ""


def student(on_dataset, *words: str) -> Config:
    return config.load(None, ["run.name=student", "model.name=densenet_bc_22_12", *on_dataset, *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.teacher=missing.safetensors"], "missing.safetensors"),
        (["distill.teacher=missing.pt2"], "missing.pt2: cannot be read"),
        (["distill.teacher=torchvision:V2"], r"name the network, such as distill.network=densenet121"),
        (["distill.weight=1.5"], "distill.weight=1.5: must be in"),
        (["distill.temperature=0"], "distill.temperature=0.0: must be greater than 0"),
    ],
)
def test_what_cannot_teach_is_one_line(on_dataset, words, message):
    index = load_indexes(student(on_dataset))[0]
    with pytest.raises(UserError, match=message):
        open_teacher(student(on_dataset, *words), index)


def test_a_teacher_of_other_classes_is_refused_by_the_name_of_one(finished, on_dataset):
    settings = student(on_dataset, f"distill.teacher={finished[1]}")
    index = replace(load_indexes(settings)[0], classes=("red", "green", "mauve"))
    with pytest.raises(UserError, match=r"are not the model's, such as .*a teacher has to know all classes"):
        open_teacher(settings, index)


def test_a_multi_label_teacher_and_multi_label_data_are_refused(colors_run, on_dataset):
    colors, result = colors_run
    settings = student(on_dataset, f"distill.teacher={result.folder}")
    with pytest.raises(UserError, match="is a multi-label model, and a teacher needs one label per image"):
        open_teacher(settings, load_indexes(settings)[0])
    settings = config.load(None, ["run.name=student", *colors, f"distill.teacher={result.folder}"])
    with pytest.raises(UserError, match="is multi-label, and a teacher needs one label per image"):
        open_teacher(settings, load_indexes(settings)[0])


def test_weights_of_the_teacher_do_not_change(classifier, images):
    before = {name: tensor.clone() for name, tensor in classifier.network.state_dict().items()}
    distill = distillation(Teacher(classifier, (0, 1, 2, 3), ""))
    distill(torch.tensor(1.0), torch.randn(5, 4, requires_grad=True), images).backward()
    after = classifier.network.state_dict()
    assert all(np.array_equal(tensor, after[name]) for name, tensor in before.items())
