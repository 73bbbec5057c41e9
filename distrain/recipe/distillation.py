"""Distillation: a network learns from the answers of a trained one, its teacher, as well as from labels."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from distrain.config import Config, TrainConfig
from distrain.data.index import Index
from distrain.data.loading.loader import normalize
from distrain.errors import UserError
from distrain.evaluation.labels import match_classes
from distrain.execution.memory_format import DEFAULT, MEMORY_FORMATS
from distrain.execution.precision import Autocast
from distrain.export.classifier import Classifier
from distrain.export.load import load_any
from distrain.export.model import Model
from distrain.masking import mask_secrets
from distrain.models import check_resolution

_CLASSES_CURE = "a teacher has to know all classes of data.train, by the same names"


@dataclass(frozen=True)
class Teacher:
    """A trained classifier and how its classes are those of the training data."""

    model: Model
    outputs: tuple[int, ...]
    """The output of `model` for each class of the data."""
    sha256: str
    """Of its weights, or of the file of an exported program."""


def open_teacher(config: Config, index: Index) -> Teacher | None:
    """Open the classifier that distill.teacher names, for the training data `index`; None if it names none.

    Raises UserError if it cannot be read or does not fit the data.
    """
    source = config.distill.teacher
    if not source:
        return None
    where = f"distill.teacher={mask_secrets(source)}"
    if index.multi_label:
        raise UserError(f"{where}: {config.data.train} is multi-label, and a teacher needs one label per image")
    try:
        model = load_any(source, config.distill.network or None, config.distill.options or None)
    except UserError as error:
        raise UserError(str(error).replace("--network ", "distill.network=")) from error
    if model.multi_label:
        raise UserError(f"{where}: is a multi-label model, and a teacher needs one label per image")
    matching = match_classes(model.classes, index.classes, config.data.train, mask=True, cure=_CLASSES_CURE)
    if isinstance(model, Classifier):
        check_resolution(model.network, min(config.data.train_sizes))
        digest = model.record["sha256"]
    else:  # whose record has that of the weights it was exported from
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    return Teacher(model, tuple(matching.labels.tolist()), digest)


class Distillation:
    """The loss of a network that also learns from a teacher (Hinton et al. 2015, section 2):

        (1 - weight) x loss of the labels + weight x T^2 x KL(softmax(teacher / T) || softmax(logits / T))

    with the temperature T, in fp32. The teacher sees the same images, augmented and mixed alike (Beyer et al. 2022),
    normalized as it was trained; it is in evaluation mode, so that its answers do not depend on the other images.
    """

    def __init__(self, config: Config, teacher: Teacher, device: torch.device) -> None:
        self._config = config.distill
        self._outputs = _selection(teacher.outputs, len(teacher.model.classes), device)
        self._answer = _answers_of(teacher.model, config.train, device)

    def __call__(self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The loss, float [], from that of the labels, the logits [n, classes] and their images [n, 3, size, size] in
        [0, 255]."""
        weight, temperature = self._config.weight, self._config.temperature
        with torch.no_grad():
            wanted = self._answer(images).float()
            if self._outputs is not None:
                wanted = wanted.index_select(1, self._outputs)
            wanted = (wanted / temperature).log_softmax(1)
        found = (logits.float() / temperature).log_softmax(1)
        divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * loss + weight * temperature**2 * divergence


def _answers_of(model: Model, config: TrainConfig, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """images in [0, 255] -> logits of the model."""
    if not isinstance(model, Classifier):  # an exported program does its own preprocessing, on the CPU
        return lambda images: model(images.round().to("cpu", torch.uint8)).to(device)
    mean, std = model.preprocessing.mean, model.preprocessing.std
    memory_format = MEMORY_FORMATS.get(config.memory_format, MEMORY_FORMATS[DEFAULT])
    network = model.network.requires_grad_(False).to(device).to(memory_format=memory_format)
    executed = Autocast(network, config.precision, memory_format).eval()
    return lambda images: executed(normalize(images, mean, std))


def _selection(outputs: Sequence[int], classes: int, device: torch.device) -> torch.Tensor | None:
    """The outputs to select, int64 [n]; None for all of them in their order."""
    return None if list(outputs) == list(range(classes)) else torch.tensor(outputs, device=device)
