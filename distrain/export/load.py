"""Load a classifier: from a run, from weights, or from an exported program."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distrain import models
from distrain.errors import UserError
from distrain.export.classifier import Classifier
from distrain.export.model import Model
from distrain.masking import mask_secrets
from distrain.models import load_weights
from distrain.models.weight_files import Weights
from distrain.preprocessing import Preprocessing
from distrain.sources import FORMS, open_weights

RECORD = "distrain"  # key of the record in an exported program's metadata
PROGRAMS = (".onnx", ".pt2")


def load(
    source: str | Path,
    network: str | None = None,
    options: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
) -> Classifier:
    """Load a classifier with its preprocessing and class names, in evaluation mode, on the CPU.

    `source` is a run, `runs/NAME[:best|last|STEP][:ema|raw]`, or weights: a file, a URL, `torchvision[:V1|V2]` or
    `timm:NAME`. Weights that distrain did not write need the name of their `network` and its `options`, and have the
    usual preprocessing of ImageNet. `classes` are other names for the outputs.

    >>> model = distrain.load("runs/mine")
    >>> scores = model(distrain.read_image("cat.jpg")).softmax(1)
    >>> model.classes[int(scores.argmax())]

    Raises UserError if there is no such source, or it does not fit.
    """
    text = str(source)
    if text.endswith(PROGRAMS):
        raise UserError(f"{text}: an exported program: open it with load_program")
    weights = open_weights(text, network)
    return from_weights(weights, network, options, classes)


def from_weights(
    weights: Weights, network: str | None, options: dict[str, Any] | None, classes: Sequence[str]
) -> Classifier:
    """Build the classifier of weights that are read. Raises UserError as `load` does."""
    record = dict(weights.record)
    name = network or record.get("network")
    if name is None:
        raise UserError(
            f"{weights.source}: does not say of which network it is: name it, such as --network densenet121"
        )
    chosen = options if options is not None else record.get("options", {}) if name == record.get("network") else {}
    outputs = next((len(t) for t in reversed(weights.tensors.values()) if t.ndim == 2), 0)
    if outputs == 0:
        raise UserError(f"{weights.source}: holds no classifier, only features: fine-tune it first with model.init")
    names = tuple(classes or weights.classes or (str(number) for number in range(outputs)))
    if len(names) != outputs:
        raise UserError(f"{weights.source}: has {outputs} classes, and {len(names)} names are given")
    built = models.build(name, outputs, **chosen)
    load_weights(built, weights)
    try:
        preprocessing = Preprocessing.from_record(record["preprocessing"]) if "preprocessing" in record else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{weights.source}: its record of the preprocessing is not readable: {error!r}") from error
    record = {
        "network": name,
        "options": chosen,
        "weights": mask_secrets(record.get("weights", weights.source)),
        "sha256": record.get("sha256", weights.sha256),
        **{key: record[key] for key in ("multi_label", "thresholds") if key in record},
    }
    if len(counts := weights.record.get("class_counts", ())) == outputs:
        record["class_counts"] = counts
    return Classifier(built, preprocessing or Preprocessing(), names, record)


class Program(Model):
    """An exported program, ONNX or torch.export, with the class names and provenance that it holds."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be opened, or was not exported by distrain."""
        self._run, record = _open_onnx(path) if path.suffix == ".onnx" else _open_torch_export(path)
        try:
            self.classes = tuple(map(str, record.pop("classes")))
            self.preprocessing = Preprocessing.from_record(record.pop("preprocessing"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: was not exported by `distrain export`: it names no classes") from error
        self.record = record

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images [n, 3, h, w] -> logits, float32 [n, classes]."""
        logits: torch.Tensor = self._run(images)
        return logits


def load_any(
    source: str, network: str | None = None, options: dict[str, Any] | None = None, classes: Sequence[str] = ()
) -> Model:
    """Load a classifier or an exported program. Raises UserError as both do."""
    if source.endswith(PROGRAMS):
        return Program(Path(source))
    return load(source, network, options, classes)


def _open_onnx(path: Path) -> tuple[Any, dict[str, Any]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path}: onnxruntime is not installed: pip install distrain[onnx]") from error
    if not path.is_file():
        raise UserError(f"{path}: not found: give {FORMS}, or a file of `distrain export`")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
        record = json.loads(session.get_modelmeta().custom_metadata_map.get(RECORD, "{}"))
    except Exception as error:  # onnxruntime has an exception class per kind of failure
        raise UserError(f"{path}: not a readable ONNX file: {' '.join(str(error).split())[:150]}") from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]), record


def _open_torch_export(path: Path) -> tuple[Any, dict[str, Any]]:
    """Open a program of torch.export without executing what it pickles: torch then loads tensors only, and a file with
    pickled objects is refused."""
    extra = {f"{RECORD}.json": ""}
    try:
        with zipfile.ZipFile(path) as archive:
            if any("custom_obj" in name for name in archive.namelist()):
                raise UserError(f"{path}: holds pickled objects, which are not loaded: export it again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a readable program of torch.export: {error}") from error
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        program = torch.export.load(str(path), extra_files=extra).module()
        record = json.loads(extra[f"{RECORD}.json"] or "{}")
    except Exception as error:  # torch raises anything for a corrupt file
        raise UserError(
            f"{path}: not a readable program of torch.export: {' '.join(str(error).split())[:150]}"
        ) from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    return program, record
