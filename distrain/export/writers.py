"""Write a classifier for others: weights for torchvision and timm, safetensors, torch.export, ONNX.

A file gets its name only after what was written has been read back and gives the same logits on images.
"""

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distrain.errors import UserError
from distrain.export.classifier import Classifier
from distrain.export.load import RECORD, Program, from_weights, load
from distrain.export.mlflow_model import WEIGHTS, write_mlflow
from distrain.files import sync_folder
from distrain.models import save_weights
from distrain.models.densenet import DenseLayer, ImageNetStem
from distrain.models.regnet import Bottleneck, ConvNorm
from distrain.models.weight_files import read_weights
from distrain.sources import torchvision_name

TARGETS = {
    "torchvision": ".pth",
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "torch_export": ".pt2",
    "onnx": ".onnx",
    "mlflow": "-mlflow",
}
"""What can be written, with the usual ending of its files."""

TOLERANCE = {"torchvision": 1e-5, "timm": 1e-5, "safetensors": 0.0, "mlflow": 0.0, "torch_export": 1e-4, "onnx": 1e-4}
"""The largest difference of a logit that is accepted, relative to the largest logit."""

_FOLDED = {  # modules whose convolution is followed by its BN
    ConvNorm: (("conv", "norm"),),
    ImageNetStem: (("conv", "norm"),),
    Bottleneck: (("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3")),
    DenseLayer: (("conv1", "norm2"),),
}


def export(
    classifier: Classifier,
    target: str,
    path: Path,
    images: Sequence[torch.Tensor],
    reference: Classifier | None = None,
) -> float:
    """Write `classifier` to `path` for a target, one of TARGETS, after comparing logits on uint8 `images` [1, 3, h, w]
    with those of the `reference`, by default the classifier itself.

    Returns the largest difference of a logit, relative to the largest logit. Raises UserError if the file cannot be
    written, the target does not have this network, or the difference exceeds TOLERANCE; the file does not exist then.
    """
    tmp = path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")
    writers: dict[str, Callable[..., Callable[[torch.Tensor], torch.Tensor]]] = {
        "torch_export": _write_torch_export,
        "onnx": _write_onnx,
        "mlflow": _write_mlflow,
    }
    try:
        with torch.no_grad():
            run = writers.get(target, _write_weights)(classifier, target, tmp)
            difference = _compare(reference or classifier, run, images)
        if not difference <= TOLERANCE[target]:  # NaN is not
            raise UserError(f"{path}: not written: {target} gives other logits, by {difference:.1e} of the largest")
        tmp.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
    return difference


def fold_batch_norm(network: nn.Module) -> int:
    """Fold every BatchNorm that follows a convolution into its weights, in place. Returns how many.

    The network computes the same, up to rounding, and has fewer operations; in a DenseNet, whose normalizations come
    first, that is only every second one. Its weights then have names that no library knows.
    """
    folded = 0
    for module in list(network.modules()):
        pairs = next((pairs for kind, pairs in _FOLDED.items() if isinstance(module, kind)), ())
        for conv, norm in pairs:
            if hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
                folded += 1
    return folded


def _compare(
    classifier: Classifier, run: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor]
) -> float:
    pairs = [(classifier(image), run(image)) for image in images]
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / max(largest, 1.0)


def _write_weights(classifier: Classifier, target: str, tmp: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    naming = "distrain" if target == "safetensors" else target
    save_weights(classifier.network, tmp, naming, classifier.to_record())
    network = _reference(target, classifier, tmp)
    if network is None:
        record = classifier.record
        loaded = from_weights(read_weights(tmp), record["network"], record["options"], classifier.classes)
        if target == "safetensors":
            return loaded
        network = loaded.network  # such a file does not say what the preprocessing is
    return lambda images: network(classifier.preprocess(images))


def _write_mlflow(classifier: Classifier, target: str, tmp: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    write_mlflow(classifier, tmp)
    return load(tmp / "artifacts" / WEIGHTS)


def _reference(target: str, classifier: Classifier, path: Path) -> nn.Module | None:
    """The library's own network with the weights in a file; None if the library is not installed or has none of this
    name, so that distrain reads the file back."""
    name, outputs = str(classifier.record["network"]), len(classifier.classes)
    if target == "torchvision":
        from torchvision.models import get_model, list_models

        if torchvision_name(name) not in list_models():
            return None
        network = get_model(torchvision_name(name), weights=None, num_classes=outputs)
    elif target == "timm":
        try:
            import timm
        except ImportError:
            return None
        if not timm.is_model(_timm_name(name)):
            return None
        network = timm.create_model(_timm_name(name), num_classes=outputs)
    else:
        return None
    tensors = read_weights(path).tensors
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{target}'s {name} is another network than this one: {reason}") from error
    return network.eval()


def _timm_name(network: str) -> str:
    """timm's name of a published network: regnety_004 for regnety_400mf, regnetx_160 for regnetx_16gf."""
    if not network.startswith("regnet"):
        return network
    kind, _, size = network.partition("_")
    number = size.removesuffix("mf").removesuffix("gf").replace("_", ".")
    hundreds = float(number) / 100 if size.endswith("mf") else float(number) * 10
    return f"{kind}_{round(hundreds):03d}"


def _write_torch_export(classifier: Classifier, target: str, tmp: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.export.save(_trace(classifier), tmp, extra_files={f"{RECORD}.json": json.dumps(classifier.to_record())})
    return Program(tmp)


def _write_onnx(classifier: Classifier, target: str, tmp: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting to onnx needs onnx and onnxscript: pip install distrain[onnx] ({error})") from error
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(_trace(classifier), dynamo=True, external_data=False)
    assert program is not None
    program.model.metadata_props[RECORD] = json.dumps(classifier.to_record())
    program.save(str(tmp), external_data=False)
    return Program(tmp)


def _trace(classifier: Classifier) -> torch.export.ExportedProgram:
    """The program of a classifier, for any number of images of any size."""
    example = torch.zeros(2, 3, 3 * classifier.preprocessing.crop, 2 * classifier.preprocessing.crop, dtype=torch.uint8)
    any_size = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(classifier, (example,), dynamic_shapes={"images": any_size})
