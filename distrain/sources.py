"""Where weights come from: files, URLs, other libraries and the checkpoints of runs."""

import re
from pathlib import Path
from typing import Any

from distrain.checkpoint import committed, read, read_best, verify, weights_digest
from distrain.checkpoint.files import checkpoint_path, step_of
from distrain.checkpoint.metadata import DamagedCheckpointError
from distrain.errors import UserError, nearest
from distrain.models.weight_files import Weights, read_weights, require_finite
from distrain.preprocessing import Preprocessing

FORMS = "a file, a URL, torchvision[:V1|V2], timm:NAME or runs/NAME[:best|last|STEP][:ema|raw]"

_RUN = re.compile(r"(?P<folder>.+?)(:(?P<which>best|last|\d+))?(:(?P<kind>ema|raw))?")


def open_weights(text: str, network: str | None) -> Weights:
    """Read the weights that `text` names, in one of FORMS; torchvision's are those of the published `network`.

    Raises UserError if there are none, they cannot be read, or they hold values that are not finite.
    """
    library, _, name = text.partition(":")
    if library == "torchvision":
        return _from_torchvision(text, name, network)
    if library == "timm":
        return _from_timm(text, name)
    if "://" not in text and (found := _RUN.fullmatch(text)):
        folder = Path(found["folder"])
        if (folder / "checkpoints").is_dir():
            return from_run(folder, found["which"], found["kind"])
        if folder.is_dir():
            raise UserError(f"{text}: not the folder of a run, which contains checkpoints/: give {FORMS}")
    return read_weights(text)


def torchvision_name(network: str) -> str:
    """torchvision's name of a published network: regnet_y_1_6gf for regnety_1_6gf."""
    return re.sub(r"^regnet([xy])_", r"regnet_\1_", network)


def _from_torchvision(text: str, version: str, network: str | None) -> Weights:
    from torchvision.models import get_model_weights

    if network is None:
        raise UserError(f"{text}: name the network, such as --network densenet121")
    try:
        available = {entry.name.rpartition("_")[2]: entry for entry in get_model_weights(torchvision_name(network))}
    except ValueError as error:
        raise UserError(f"{text}: torchvision has no {network}: `distrain models` lists its networks") from error
    available = {name: entry for name, entry in available.items() if name in ("V1", "V2")}
    if version and version not in available:
        raise UserError(f"{text}: torchvision has no such weights of {network}: {nearest(version, available)}")
    entry = available[version or max(available)].value
    weights = read_weights(entry.url)
    preset = entry.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0],
        preset.crop_size[0],
        preset.interpolation.value,
        tuple(preset.mean),
        tuple(preset.std),
    )
    return _described(weights, entry.meta["categories"], network, {}, preprocessing)


def _from_timm(text: str, name: str) -> Weights:
    try:
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise UserError(f"{text}: timm is not installed: pip install distrain[timm]") from error
    config = get_pretrained_cfg(name) if name else None
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(f"{text}: timm has no weights of this name: timm.list_pretrained() lists them")
    if not config.hf_hub_id:
        return read_weights(config.url)
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(config.hf_hub_id, "model.safetensors")
    except Exception as error:  # many kinds: no network, no such file, no permission
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{text}: download failed: {reason} (retry, or download it and pass the path)") from error
    weights = read_weights(path)
    crop = config.input_size[-1]
    preprocessing = Preprocessing(
        round(crop / config.crop_pct), crop, config.interpolation, tuple(config.mean), tuple(config.std)
    )
    record = {"preprocessing": preprocessing.to_record()}
    return Weights(text, weights.tensors, weights.sha256, weights.ignored, record=record)


def from_run(folder: Path, which: str | None, kind: str | None) -> Weights:
    """The weights of a checkpoint: by default the best one of the run, else the newest, and its EMA if it has one.

    Raises UserError if there is no such checkpoint, or it is damaged.
    """
    path = _find_checkpoint(folder, which)
    try:
        verify(path)
    except DamagedCheckpointError as error:
        raise UserError(f"{path}: damaged: {error}: name another step, {folder}:STEP") from error
    snapshot = read(path)
    prefix = "ema/" if kind != "raw" and any(name.startswith("ema/") for name in snapshot.tensors) else "model/"
    if kind == "ema" and prefix != "ema/":
        raise UserError(f"{folder}: this run has no EMA: leave out :ema")
    tensors = {name.removeprefix(prefix): t for name, t in snapshot.tensors.items() if name.startswith(prefix)}
    source = f"{folder}:{snapshot.step}:{'ema' if prefix == 'ema/' else 'raw'}"
    require_finite(source, tensors)
    digest = weights_digest({f"model/{name}": tensor for name, tensor in tensors.items()}).removeprefix("sha256:")
    weights = Weights(source, tensors, digest)
    settings = snapshot.extra["identity"]
    classes = snapshot.extra.get("classes", [])
    preprocessing = Preprocessing.from_settings(settings)
    described = _described(weights, classes, settings["model.name"], settings["model.options"], preprocessing)
    if "class_counts" in snapshot.extra:  # absent from runs of older releases
        described.record["class_counts"] = snapshot.extra["class_counts"]
    if snapshot.extra.get("multi_label"):
        described.record["multi_label"] = True
    return described


def _find_checkpoint(folder: Path, which: str | None) -> Path:
    checkpoints = folder / "checkpoints"
    steps = {step_of(path) for path in committed(checkpoints)}
    if not steps:
        raise UserError(f"{folder}: this run has no checkpoint yet")
    best = read_best(checkpoints)
    if which == "best" and (best is None or best[0] not in steps):
        raise UserError(f"{folder}: this run has no best checkpoint: leave out :best for the newest")
    if which in (None, "best") and best is not None and best[0] in steps:
        return checkpoint_path(checkpoints, best[0])
    step = max(steps) if which in (None, "last", "best") else int(str(which))
    if step not in steps:
        raise UserError(f"{folder}: no checkpoint of step {step}; found {', '.join(map(str, sorted(steps)))}")
    return checkpoint_path(checkpoints, step)


def _described(
    weights: Weights, classes: list[str], network: str, options: dict[str, Any], preprocessing: Preprocessing
) -> Weights:
    record = {
        "network": network,
        "options": options,
        "classes": list(classes),
        "preprocessing": preprocessing.to_record(),
        "weights": weights.source,
        "sha256": weights.sha256,
    }
    return Weights(weights.source, weights.tensors, weights.sha256, weights.ignored, tuple(classes), record)
