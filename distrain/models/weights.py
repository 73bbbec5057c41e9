"""Convert weights from and to other libraries: the same tensors under different names.

pycls trains on BGR images, everyone else on RGB, so the input channels of the stem are flipped in conversion.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from distrain.errors import UserError, nearest
from distrain.models.densenet import DenseNet
from distrain.models.published import PUBLISHED
from distrain.models.regnet import AnyNet, RegNetConfig
from distrain.models.regnet_widths import WidthRule
from distrain.models.weight_files import Tensors, Weights, read_weights, write_weights

OURS = "distrain"

# Our module names to the library's. # is an index; {a} and {b} are the first and second one counted from 1, {b0} is the
# second counted from 0.
_DENSENET_NAMES = {
    "stem.conv": "features.conv0",
    "stem.norm": "features.norm0",
    **{
        f"blocks.#.#.{layer}": f"features.denseblock{{a}}.denselayer{{b}}.{layer}"
        for layer in ("norm1", "conv1", "norm2", "conv2")
    },
    "transitions.#.norm": "features.transition{a}.norm",
    "transitions.#.conv": "features.transition{a}.conv",
    "norm": "features.norm5",
    "head": "classifier",
}

_REGNET_TORCHVISION = {
    "stem.conv": "stem.0",
    "stem.norm": "stem.1",
    **{
        f"stages.#.#.{module}": f"trunk_output.block{{a}}.block{{a}}-{{b0}}.{target}"
        for module, target in {
            "conv1": "f.a.0",
            "norm1": "f.a.1",
            "conv2": "f.b.0",
            "norm2": "f.b.1",
            "se.reduce": "f.se.fc1",
            "se.expand": "f.se.fc2",
            "conv3": "f.c.0",
            "norm3": "f.c.1",
            "shortcut.conv": "proj.0",
            "shortcut.norm": "proj.1",
        }.items()
    },
    "head": "fc",
}

_REGNET_TIMM = {
    "stem.conv": "stem.conv",
    "stem.norm": "stem.bn",
    **{
        f"stages.#.#.{module}": f"s{{a}}.b{{b}}.{target}"
        for module, target in {
            "conv1": "conv1.conv",
            "norm1": "conv1.bn",
            "conv2": "conv2.conv",
            "norm2": "conv2.bn",
            "se.reduce": "se.fc1",
            "se.expand": "se.fc2",
            "conv3": "conv3.conv",
            "norm3": "conv3.bn",
            "shortcut.conv": "downsample.conv",
            "shortcut.norm": "downsample.bn",
        }.items()
    },
    "final.conv": "final_conv.conv",
    "final.norm": "final_conv.bn",
    "head": "head.fc",
}

_REGNET_PYCLS = {
    "stem.conv": "stem.conv",
    "stem.norm": "stem.bn",
    **{
        f"stages.#.#.{module}": f"s{{a}}.b{{b}}.{target}"
        for module, target in {
            "conv1": "f.a",
            "norm1": "f.a_bn",
            "conv2": "f.b",
            "norm2": "f.b_bn",
            "se.reduce": "f.se.f_ex.0",
            "se.expand": "f.se.f_ex.2",
            "conv3": "f.c",
            "norm3": "f.c_bn",
            "shortcut.conv": "proj",
            "shortcut.norm": "bn",
        }.items()
    },
    "final.conv": "head.conv",
    "final.norm": "head.bn",
    "head": "head.fc",
}

_NAMINGS: dict[type[nn.Module], dict[str, dict[str, str]]] = {
    DenseNet: {"torchvision": _DENSENET_NAMES, "timm": _DENSENET_NAMES},
    AnyNet: {"torchvision": _REGNET_TORCHVISION, "timm": _REGNET_TIMM, "pycls": _REGNET_PYCLS},
}


def load_weights(network: nn.Module, source: str | Path | Weights, classes: Sequence[str] = ()) -> str:
    """Load weights into `network` from a file (.safetensors or torch.save) or a URL, in any known naming.

    `classes` are the names of the network's outputs. Where source and network both name their classes, the rows of the
    classifier are copied by name, and other classes keep their initialization; otherwise a classifier for another
    number of classes does. Returns a one-line summary: what was loaded, what is newly initialized and which EMA
    weights were ignored. Raises UserError if the source cannot be read or has missing keys, unexpected keys, shape
    mismatches or values that are not finite, before any weight changes.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    naming, names = _detect_naming(network, weights)
    state = network.state_dict()
    found = {name: weights.tensors[foreign] for name, foreign in names.items() if foreign in weights.tensors}
    if naming == "pycls" and "stem.conv.weight" in found:
        found["stem.conv.weight"] = found["stem.conv.weight"].flip(1)
    initialized = []
    if head := _fit_head(state, found, weights.classes, classes):
        initialized.append(head)
    missing = {name for name in state if name not in found and not name.startswith("head.")}
    counters = {name for name in missing if name.endswith(".num_batches_tracked")}
    if counters:  # absent from torchvision's DenseNets; unused, as our BN has a fixed momentum
        initialized.append("num_batches_tracked")
    mismatches = [
        _summarize("missing keys", missing - counters),
        _summarize("unexpected keys", weights.tensors.keys() - names.values()),
        _summarize("shape mismatch", (n for n, tensor in found.items() if tensor.shape != state[n].shape)),
    ]
    if any(mismatches):
        raise UserError(
            f"{weights.source}: weights ({naming} names) do not match this network: "
            f"{'; '.join(text for text in mismatches if text)}{_suggest_network(network, weights, found)}"
        )
    network.load_state_dict({**state, **found})
    summary = f"{weights.source}: loaded {len(found)} tensors ({naming} names)"
    summary += f"; newly initialized: {', '.join(initialized) or 'none'}"
    return summary + (f"; ignored: {', '.join(weights.ignored)}" if weights.ignored else "")


def save_weights(
    network: nn.Module, path: str | Path, naming: str = OURS, record: dict[str, Any] | None = None
) -> None:
    """Save the weights as .safetensors, or with torch.save for any other suffix, in a naming: distrain, torchvision,
    timm or pycls. A .safetensors file also holds the `record`, JSON values that describe the network.

    Raises UserError if the naming does not support the network or the file cannot be written.
    """
    names = translate_names(network, naming)
    tensors = {names[name]: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    if naming == "pycls":
        stem = names["stem.conv.weight"]
        tensors[stem] = tensors[stem].flip(1)
    as_pycls = naming == "pycls" and Path(path).suffix != ".safetensors"
    write_weights({"model_state": tensors} if as_pycls else tensors, Path(path), record)


def translate_names(network: nn.Module, naming: str) -> dict[str, str]:
    """Map each tensor name of the network to its name in `naming` (distrain, torchvision, timm or pycls).

    Raises UserError if `naming` does not support the network.
    """
    if naming == OURS:
        return {name: name for name in network.state_dict()}
    namings = _NAMINGS[type(network)]
    if naming not in namings:
        raise UserError(f"{naming} has no names for {type(network).__name__}: {nearest(naming, [OURS, *namings])}")
    return {name: _translate(name, naming, namings[naming]) for name in network.state_dict()}


def _translate(name: str, naming: str, templates: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    entries = module.split(".")
    numbers = [int(entry) for entry in entries if entry.isdigit()]
    template = templates.get(".".join("#" if entry.isdigit() else entry for entry in entries))
    if template is None:
        raise UserError(f"{naming} has no name for {module}: use {OURS} names")
    a, b = (*numbers, 0, 0)[:2]
    return f"{template.format(a=a + 1, b=b + 1, b0=b)}.{leaf}"


def _detect_naming(network: nn.Module, weights: Weights) -> tuple[str, dict[str, str]]:
    """Return the naming that shares the most names with the file, and its names of the network's tensors."""
    best, best_names, max_shared = "", {}, 0
    for naming in (OURS, *_NAMINGS[type(network)]):
        try:
            names = translate_names(network, naming)
        except UserError:  # this naming lacks a module of the network, so the file cannot use it
            continue
        shared = len(weights.tensors.keys() & names.values())
        if shared > max_shared:
            best, best_names, max_shared = naming, names, shared
    if 2 * max_shared < len(weights.tensors):
        family, example = type(network).__name__, next(iter(weights.tensors))
        raise UserError(
            f"{weights.source}: not the weights of any {family}: unexpected keys such as {example}"
            f"{_suggest_network(network, weights, {})}"
        )
    return best, best_names


def _fit_head(state: Tensors, found: Tensors, in_file: Sequence[str], classes: Sequence[str]) -> str:
    """Make the classifier in `found` that of `classes`. Returns what of it is newly initialized and why, or ''."""
    if "head.weight" not in found or "head.bias" not in found:
        _drop_head(found)
        return "head (not in the file)"
    rows, outputs = found["head.bias"].numel(), state["head.bias"].numel()
    if found["head.weight"].shape != (rows, state["head.weight"].shape[1]):
        return ""  # reported as a shape mismatch
    if len(in_file) != rows or len(classes) != outputs or _are_numbers(in_file) or _are_numbers(classes):
        if rows == outputs:
            return ""
        _drop_head(found)
        return f"head (the file has {rows} classes, the network {outputs})"
    index = {name: row for row, name in enumerate(in_file)}
    known = [number for number, name in enumerate(classes) if name in index]
    if not known:
        _drop_head(found)
        return f"head (none of its {outputs} classes is among the {rows} of the file)"
    source = torch.tensor([index[classes[number]] for number in known])
    for name in ("head.weight", "head.bias"):
        tensor = state[name].cpu().to(found[name].dtype, copy=True)
        tensor[known] = found[name][source]
        found[name] = tensor
    return f"{outputs - len(known)} of {outputs} classes of the head" if len(known) < outputs else ""


def _drop_head(found: Tensors) -> None:
    for name in [name for name in found if name.startswith("head.")]:
        del found[name]


def _are_numbers(classes: Sequence[str]) -> bool:
    """Whether names are only the numbers of the classes, which say nothing of what they are."""
    return list(classes) == [str(number) for number in range(len(classes))]


def _suggest_network(network: nn.Module, weights: Weights, found: Tensors) -> str:
    """Return how to load the file, if it holds a published network, or an empty string."""
    if rule := _suggest_width_rule(network, found):
        return rule
    matrix = next((t for t in reversed(weights.tensors.values()) if t.ndim == 2), None)
    if matrix is None:
        return ""
    classes, width = matrix.shape
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    parameters = sum(t.numel() for name, t in weights.tensors.items() if not name.endswith(buffers))
    features = parameters - classes * (width + 1)
    for name, entry in PUBLISHED.items():
        if entry.cost.params - entry.num_classes * (width + 1) == features:
            return f"; they look like those of {name}: set model.name={name}"
    return ""


def _suggest_width_rule(network: nn.Module, found: Tensors) -> str:
    """Return the width rule to set if the file is a published RegNet of the other rule, or an empty string."""
    if not isinstance(network, AnyNet):
        return ""
    widths = [stage.width for stage in network.config.stages]
    norms = [found.get(f"stages.{number}.0.norm3.weight") for number in range(len(widths))]
    file_widths = [0 if norm is None else norm.numel() for norm in norms]
    regnets = [entry.config for entry in PUBLISHED.values() if entry.family == "regnet"]
    if widths == file_widths:
        return ""
    for config, (rule, other) in product(regnets, permutations(get_args(WidthRule))):
        if widths == _stage_widths(config, rule) and file_widths == _stage_widths(config, other):
            return f"; the file was built with width_rule={other}: set that model option"
    return ""


def _stage_widths(config: Mapping[str, Any], rule: WidthRule) -> list[int]:
    return [stage.width for stage in RegNetConfig(**config, width_rule=rule).stages()]


def _summarize(label: str, names: Iterable[str]) -> str:
    """Return the label with the first name and the number of others, or an empty string."""
    names = sorted(names)
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{label}: {names[0]}{rest}" if names else ""
