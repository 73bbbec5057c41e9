"""Settings of a run that are varied: their ranges, checked by its configuration, and the members of a sweep."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain import config
from distrain.config.values import ValueProblem, kind_of, read_text
from distrain.errors import UserError, nearest
from distrain.models import network_config
from distrain.models.analytic import network_cost
from distrain.models.complexity import Cost
from distrain.rng import Stream, uniform
from distrain.sweep.population import RUN_KEYS, Member, override
from distrain.sweep.ranges import TEXT_FORMS, Range, Value

NAME = "tune"
"""Of the space of all members."""
_OPTION = "model.options."
_FIXED = (*RUN_KEYS, "model.name")


class SearchSpace:
    """The ranges of settings, around a configuration."""

    def __init__(self, path: str | Path | None, overrides: Sequence[str], specs: Sequence[str]) -> None:
        """`path` and `overrides` as config.load has them; `specs` such as "optimizer.lr=log:0.01..1".

        Raises UserError, naming the key, if one is no setting that can be varied, or the ends of its range are invalid.
        """
        self._path = path
        self._overrides = [*overrides, "run.name=member"]
        self.config = config.load(path, self._overrides)
        self._network = network_config(self.config.model.name, **self.config.model.options)
        self._values = config.flatten(config.to_dict(self.config))
        self._values |= {f"{_OPTION}{name}": value for name, value in vars(self._network).items()}
        self.texts: dict[str, str] = {}
        """The ranges by key, as they were given."""
        for spec in specs:
            key, equals, text = spec.partition("=")
            if not equals:
                raise UserError(f"--vary {spec}: write KEY=RANGE; a range is {TEXT_FORMS}")
            if key in self.texts:
                raise UserError(f"--vary {spec}: {key} is varied twice: leave one out")
            self.texts[key] = text
        self.ranges = {key: self._read_range(key, text) for key, text in self.texts.items()}
        for key, found in self.ranges.items():
            for value in found.ends:
                self._check(key, value)

    @property
    def default(self) -> dict[str, Value] | None:
        """The configuration's own values; None unless all lie in their ranges."""
        own = {key: self._values[key] for key in self.ranges}
        return own if all(own[key] in found for key, found in self.ranges.items()) else None

    def draw(self, seed: int, index: int) -> dict[str, Value]:
        """Values of all settings, a function of seed and index: the first are the configuration's own, if they lie in
        the ranges, the others are independent and as likely as the ranges say."""
        if index == 0 and self.default is not None:
            return self.default
        digest = zlib.crc32(repr(sorted(self.texts.items())).encode())
        numbers = uniform(seed, Stream.SPACE, digest, index, range(len(self.ranges))).tolist()
        return {key: found.draw(number) for (key, found), number in zip(self.ranges.items(), numbers, strict=True)}

    def member(self, index: int, values: Mapping[str, Value]) -> Member:
        """The member that trains with `values`. Values that do not go together are reported by its run."""
        model = self.config.model
        options = {key.removeprefix(_OPTION): value for key, value in values.items() if key.startswith(_OPTION)}
        options = {**model.options, **options}
        size: Any = values.get("data.image_size", self.config.data.image_size)
        try:
            cost = network_cost(network_config(model.name, **options), model.num_classes, size)
        except UserError:
            cost = Cost()
        return Member(
            space=NAME, index=index, network=model.name, options=options, parameters=dict(values), flops=cost.flops,
            params=cost.params, activations=cost.conv_activations,
            settings={key: value for key, value in values.items() if not key.startswith(_OPTION)},
        )  # fmt: skip

    def _read_range(self, key: str, text: str) -> Range:
        where = f"--vary {key}={text}"
        if key in _FIXED:
            raise UserError(f"{where}: {key} cannot be varied: the sweep sets it")
        if key not in self._values:
            raise UserError(f"{where}: unknown key {key}: {nearest(key, self._values)}")
        if isinstance(self._values[key], (list, tuple, dict)):
            raise UserError(f"{where}: {key} has several values: only a setting of one value can be varied")
        kind = kind_of(key, config.Config)
        if key.startswith(_OPTION):
            kind = kind_of(key.removeprefix(_OPTION), type(self._network))
            kind = kind if kind in (int, float) else Any

        def read(word: str) -> Value:
            try:
                value: Value = read_text(word, kind, key)
            except ValueProblem as error:
                raise UserError(f"{where}: {error}") from error
            return value

        return Range.from_text(text, where, read)

    def _check(self, key: str, value: Value) -> None:
        """Raise UserError unless the configuration accepts a value, all others being its own."""
        where = f"--vary {key}={self.texts[key]}"
        try:
            changed = config.load(self._path, [*self._overrides, override(key, value)])
            network = network_config(changed.model.name, **changed.model.options)
            network_cost(network, changed.model.num_classes, changed.data.image_size)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
