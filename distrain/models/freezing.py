"""Freeze parts of a network, for fine-tuning."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from distrain.errors import UserError, nearest


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that always uses its running statistics, and never updates them."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        super().train(False)
        return self


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters that `patterns` name, in place, and the running statistics of their normalizations.

    Raises UserError as `parameters_named`, and if nothing remains to be trained.
    """
    frozen = parameters_named(network, patterns, "train.freeze")
    if len(frozen) == sum(1 for _ in network.parameters()):
        raise UserError(f"train.freeze={list(patterns)} leaves nothing to train: add '!head'")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and f"{name}.weight" in frozen:
            module.__class__ = FrozenBatchNorm2d  # keeps its tensors and their names
            module.eval()


def parameters_named(network: nn.Module, patterns: Sequence[str], setting: str) -> set[str]:
    """The names of the parameters that `patterns`, the value of a `setting`, name.

    A pattern is the name of a module or a parameter, or a glob: `stem`, `stages.0`, `blocks.*.norm1`. A leading `!`
    excludes what it names from those before it: `*` and `!head` name all but the classifier. Raises UserError for a
    pattern that names nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        plain = pattern.removeprefix("!")
        named = {name for name in names if fnmatchcase(name, plain) or fnmatchcase(name, f"{plain}.*")}
        if not named:
            modules = [name for name, _ in network.named_modules() if name]
            raise UserError(f"{setting}: {pattern} names no part of this network: {nearest(plain, modules)}")
        found = found - named if pattern.startswith("!") else found | named
    return found
