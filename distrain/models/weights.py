"""Weights from and for other libraries: the same tensors under other names.

pycls trains on images whose channels are blue, green, red; ours are red, green, blue like everybody else's. So the
input channels of the stem are reversed on the way.
"""

from collections.abc import Iterable, Mapping
from itertools import permutations, product
from pathlib import Path
from typing import Any, get_args

from torch import nn

from distrain.errors import UserError, nearest
from distrain.models.densenet import DenseNet
from distrain.models.published import PUBLISHED
from distrain.models.regnet import AnyNet, RegNetConfig
from distrain.models.regnet_widths import WidthRule
from distrain.models.weight_files import Tensors, read_weights, write_weights

OURS = "distrain"

# Our module names on the left, # for a number. On the right {a} and {b} are these numbers counted from 1, {b0} is
# the second one counted from 0.
_DENSENET_NAMES = {
    "stem.conv": "features.conv0",
    "stem.norm": "features.norm0",
    **{
        f"blocks.#.#.{part}": f"features.denseblock{{a}}.denselayer{{b}}.{part}"
        for part in ("norm1", "conv1", "norm2", "conv2")
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
        f"stages.#.#.{ours}": f"trunk_output.block{{a}}.block{{a}}-{{b0}}.{theirs}"
        for ours, theirs in {
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
        f"stages.#.#.{ours}": f"s{{a}}.b{{b}}.{theirs}"
        for ours, theirs in {
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
        f"stages.#.#.{ours}": f"s{{a}}.b{{b}}.{theirs}"
        for ours, theirs in {
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


def load_weights(network: nn.Module, source: str | Path) -> str:
    """Fill `network` from a file (.safetensors, or anything of torch.save) or a URL; whose names it holds is seen
    from the names.

    A classifier for another number of classes is left as it is, freshly made. Returns a line that says what was
    loaded, what is new and which averages of the weights were left in the file. Raises UserError for a source that
    cannot be read and for missing, unexpected or misshapen tensors, before anything is changed.
    """
    tensors, averages = read_weights(source)
    naming, names = _recognise(network, tensors, source)
    own = network.state_dict()
    found = {name: tensors[foreign] for name, foreign in names.items() if foreign in tensors}
    if naming == "pycls" and "stem.conv.weight" in found:
        found["stem.conv.weight"] = found["stem.conv.weight"].flip(1)
    new = []
    if head := _differing_head(own, found):
        found = {name: tensor for name, tensor in found.items() if not name.startswith("head.")}
        new.append(head)
    missing = {name for name in own if name not in found and not name.startswith("head.")}
    counters = {name for name in missing if name.endswith(".num_batches_tracked")}
    if counters:  # torchvision's DenseNets are older than these; no momentum of ours depends on them
        new.append("batch counters")
    faults = [
        _describe("lacks", missing - counters),
        _describe("also holds", tensors.keys() - names.values()),
        _describe("has another shape of", (n for n, tensor in found.items() if tensor.shape != own[n].shape)),
    ]
    if any(faults):
        raise UserError(
            f"{source}: these are not weights of this network: the file ({naming} names) "
            f"{', '.join(fault for fault in faults if fault)}{_suggest_width_rule(network, found)}"
        )
    network.load_state_dict({**own, **found})
    report = f"{source}: loaded {len(found)} tensors ({naming} names); new: {', '.join(new) or 'nothing'}"
    return report + (f"; not taken: {', '.join(averages)}" if averages else "")


def save_weights(network: nn.Module, path: str | Path, naming: str = OURS) -> None:
    """Write the weights to a .safetensors file, or another of torch.save, under the names of distrain, torchvision,
    timm or pycls. Raises UserError for a naming that has no place for this network, or a file that cannot be
    written."""
    names = translate_names(network, naming)
    tensors = {names[name]: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}
    if naming == "pycls":
        stem = names["stem.conv.weight"]
        tensors[stem] = tensors[stem].flip(1)
    as_pycls = naming == "pycls" and Path(path).suffix != ".safetensors"
    write_weights({"model_state": tensors} if as_pycls else tensors, Path(path))


def translate_names(network: nn.Module, naming: str) -> dict[str, str]:
    """What `naming` (distrain, torchvision, timm or pycls) calls each tensor of the network.

    Raises UserError for a naming that has no place for this network.
    """
    if naming == OURS:
        return {name: name for name in network.state_dict()}
    namings = _NAMINGS[type(network)]
    if naming not in namings:
        raise UserError(f"{naming} has no names for a {type(network).__name__}: {nearest(naming, [OURS, *namings])}")
    return {name: _translate(name, naming, namings[naming]) for name in network.state_dict()}


def _translate(name: str, naming: str, templates: Mapping[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    template = templates.get(".".join("#" if part.isdigit() else part for part in parts))
    if template is None:
        raise UserError(f"{naming} has no place for {module}: use {OURS} names")
    a, b = (*numbers, 0, 0)[:2]
    return f"{template.format(a=a + 1, b=b + 1, b0=b)}.{leaf}"


def _recognise(network: nn.Module, tensors: Tensors, source: str | Path) -> tuple[str, dict[str, str]]:
    """The naming that shares most names with the file, and what it calls the network's tensors."""
    best, best_names, most = "", {}, 0
    for naming in (OURS, *_NAMINGS[type(network)]):
        try:
            names = translate_names(network, naming)
        except UserError:  # this naming has no place for some part of the network, so the file is not in it
            continue
        shared = len(tensors.keys() & names.values())
        if shared > most:
            best, best_names, most = naming, names, shared
    if 2 * most < len(tensors):
        family, example = type(network).__name__, next(iter(tensors))
        raise UserError(f"{source}: these are not weights of any {family}: it holds {example} and the like")
    return best, best_names


def _differing_head(own: Tensors, found: Tensors) -> str:
    """Why the classifier cannot be taken from the file, or nothing."""
    if "head.weight" not in found or "head.bias" not in found:
        return "head (the file has none)"
    classes, ours = found["head.bias"].numel(), own["head.bias"].numel()
    return "" if classes == ours else f"head (the file has {classes} classes, the network {ours})"


def _suggest_width_rule(network: nn.Module, found: Tensors) -> str:
    """Where a published RegNet has the widths of the file under the other width rule: how to build that one."""
    if not isinstance(network, AnyNet):
        return ""
    ours = [stage.width for stage in network.config.stages]
    norms = [found.get(f"stages.{number}.0.norm3.weight") for number in range(len(ours))]
    theirs = [0 if norm is None else norm.numel() for norm in norms]
    regnets = [entry.config for entry in PUBLISHED.values() if entry.family == "regnet"]
    for config, (own, other) in product(regnets, permutations(get_args(WidthRule))):
        if ours != theirs and ours == _stage_widths(config, own) and theirs == _stage_widths(config, other):
            return f"; it is made with width_rule={other}: build the network with that option"
    return ""


def _stage_widths(config: Mapping[str, Any], rule: WidthRule) -> list[int]:
    return [stage.width for stage in RegNetConfig(**config, width_rule=rule).stages()]


def _describe(verb: str, names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{verb} {names[0]}{rest}" if names else ""
