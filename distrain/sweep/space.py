"""A design space: which networks there are, read from a file."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from distrain.config.files import read_layers
from distrain.errors import UserError, nearest
from distrain.models.densenet import DenseNetConfig
from distrain.models.regnet import AnyNetConfig, RegNetConfig, StageConfig
from distrain.sweep.expressions import Expression
from distrain.sweep.ranges import FORMS, Range

Family = Literal["regnet", "anynet", "densenet"]
Order = Literal["", "rising", "falling"]

CONFIGS: dict[str, type] = {"regnet": RegNetConfig, "anynet": AnyNetConfig, "densenet": DenseNetConfig}
COSTS = ("flops", "params", "activations")
_COUNTS = ("stages", "blocks", "widths", "depths")


@dataclass(frozen=True)
class SpaceFile:
    """What a file of a design space holds."""

    network: Family
    stages: int = 0
    """Stages of an AnyNet, or dense blocks; those of a RegNet follow from its parameters."""
    sample: dict[str, Any] = field(default_factory=dict)
    """Options that are drawn: how, `per: stage` for a value of its own in each, `order: rising|falling` of these."""
    derive: dict[str, Any] = field(default_factory=dict)
    """Options that follow from what is drawn, as expressions."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Options that all networks share."""
    flops: list[Any] = field(default_factory=list)
    """The fewest and the most multiply-adds for one image, such as [360MF, 0.4GF]; any number if it is empty."""
    keep: list[str] = field(default_factory=list)
    """Conditions that every network fulfills: others are drawn again."""


@dataclass(frozen=True)
class Parameter:
    """An option that is drawn."""

    name: str
    range: Range
    per_stage: bool = False
    """Whether each stage has a value of its own."""
    order: Order = ""
    """How these values are sorted."""

    def count(self, stages: int) -> float:
        """How many values, or sorted lists of values, there are."""
        if not self.per_stage:
            return self.range.count
        values = self.range.count
        if not self.order or math.isinf(values):
            return values**stages
        return math.comb(int(values) + stages - 1, stages)


@dataclass(frozen=True)
class Space:
    """A family of networks, what distinguishes them and the conditions they fulfill."""

    name: str
    network: Family
    stages: int
    parameters: tuple[Parameter, ...]
    derived: Mapping[str, Expression]
    fixed: Mapping[str, Any]
    conditions: tuple[Expression, ...]

    @property
    def digest(self) -> int:
        """Differs between spaces, 32 bits, so that their samples are independent."""
        content = [
            self.network,
            self.stages,
            [repr(parameter) for parameter in self.parameters],
            {name: expression.text for name, expression in self.derived.items()},
            dict(self.fixed),
            [condition.text for condition in self.conditions],
        ]
        return zlib.crc32(json.dumps(content, sort_keys=True).encode())

    def count(self) -> float:
        """How many ways to draw there are, before any condition."""
        return math.prod(parameter.count(self.stages) for parameter in self.parameters)


def load_space(
    path: Path,
    fixed: Mapping[str, Any] | None = None,
    keep: Sequence[str] = (),
    flops: Sequence[float] = (),
) -> Space:
    """Read a design space and what it extends. `fixed` options and conditions to `keep` are added to its own, `flops`,
    the fewest and the most multiply-adds, replace them.

    An entry of a file replaces that of the file it extends, conditions add up. Raises UserError.
    """
    found: dict[str, Any] = {"stages": 0, "sample": {}, "derive": {}, "fixed": {}, "flops": [], "keep": []}
    for _, layer in read_layers(path, SpaceFile, "network: anynet"):
        for name, value in layer.items():
            if name in ("sample", "derive", "fixed"):
                found[name] = {**found[name], **value}
            else:
                found[name] = [*found[name], *value] if name == "keep" else value
    if found.get("network") not in CONFIGS:
        raise UserError(f"{path}: network must be set to one of {', '.join(CONFIGS)}")
    found["fixed"] = {**found["fixed"], **(fixed or {})}
    found["keep"] = [*found["keep"], *keep]
    if flops:
        found["flops"] = list(flops)
    return _check(path, SpaceFile(**found))


def read_flops(text: str, where: str) -> float:
    """Read multiply-adds: 400MF, 1.6GF or a plain number. Raises UserError, which begins with `where`."""
    unit = {"MF": 1e6, "GF": 1e9}.get(text.strip()[-2:].upper())
    try:
        return float(text.strip()[:-2]) * unit if unit else float(text)
    except ValueError as error:
        raise UserError(f"{where}: write multiply-adds as 400MF, 1.6GF or 4e8") from error


def _check(path: Path, file: SpaceFile) -> Space:
    options = _known_options(file.network)
    if file.network == "regnet" and file.stages:
        raise UserError(f"{path}: stages: leave it out: those of a RegNet follow from its parameters")
    if file.network != "regnet" and file.stages < 1:
        raise UserError(f"{path}: stages must be set, such as stages: 4")
    for section in ("sample", "derive", "fixed"):
        for name in getattr(file, section):
            if name not in options:
                raise UserError(f"{path}: {section}: {file.network} has no option {name}: {nearest(name, options)}")
    if both := set(file.sample) & set(file.fixed) | set(file.derive) & {*file.sample, *file.fixed}:
        raise UserError(f"{path}: {min(both)} is set twice, in two of sample, derive and fixed: leave one out")
    if not file.sample:
        raise UserError(f"{path}: sample: nothing is drawn: name an option, such as depth: {FORMS}")
    parameters = tuple(_parameter(path, name, entry, file) for name, entry in file.sample.items())
    drawn = [parameter.name for parameter in parameters]
    derived = {name: Expression(str(text), drawn, f"{path}: derive: {name}") for name, text in file.derive.items()}
    known = {*drawn, *derived, *COSTS, *_COUNTS}
    limits = [read_flops(str(number), f"{path}: flops: {number}") for number in file.flops]
    if limits and (len(limits) != 2 or not 0 <= limits[0] < limits[1]):
        raise UserError(f"{path}: flops needs two numbers, [FEWEST, MOST], not {file.flops}")
    window = ["{:g} <= flops <= {:g}".format(*limits)] if limits else []
    conditions = tuple(Expression(text, known, f"{path}: keep") for text in [*file.keep, *window])
    return Space(path.stem, file.network, file.stages, parameters, derived, file.fixed, conditions)


def _known_options(network: Family) -> set[str]:
    names = {entry.name for entry in fields(CONFIGS[network])}
    if network == "anynet":
        return names - {"stages"} | {entry.name for entry in fields(StageConfig)}
    return names - {"depths"} | {"depth"} if network == "densenet" else names


def _parameter(path: Path, name: str, entry: Any, file: SpaceFile) -> Parameter:
    where = f"{path}: sample: {name}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: write {FORMS}")
    if unknown := sorted(map(str, entry.keys() - {"uniform", "log", "choice", "step", "per", "order"})):
        raise UserError(f"{where}: {unknown[0]} is not known: write {FORMS}, step, per: stage, order: rising")
    per_stage = "per" in entry
    order = entry.get("order", "")
    if per_stage and (entry["per"] != "stage" or name not in stage_options(file.network)):
        raise UserError(f"{where}: per: stage is for {', '.join(sorted(stage_options(file.network))) or 'AnyNets'}")
    if order not in ("", "rising", "falling") or (order and not per_stage):
        raise UserError(f"{where}: order is rising or falling, of a value per: stage")
    return Parameter(name, Range.parse(entry, where), per_stage, order)


def stage_options(network: Family) -> set[str]:
    """The options that each stage has."""
    if network == "anynet":
        return {entry.name for entry in fields(StageConfig)}
    return {"depth"} if network == "densenet" else set()
