"""Networks of a design space: the i-th is a pure function of (space, seed, i)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from distrain.errors import UserError
from distrain.models import network_config
from distrain.models.analytic import network_cost
from distrain.models.densenet import DenseNetConfig
from distrain.models.regnet import AnyNetConfig, RegNetConfig
from distrain.models.regnet_widths import adjust_width, count_stages
from distrain.rng import Stream, uniform
from distrain.sweep.population import Member
from distrain.sweep.ranges import Value
from distrain.sweep.space import COSTS, Space, stage_options

_BATCH = 64
_MAX_DRAWS = 200_000
_UNFIT = "the network cannot be built"
_BECAUSE = ": "  # before the problem of one network
_LINE = ("depth", "w0", "wa", "wm")
_DEEPEST = 1000  # blocks; the stages of deeper networks are not counted in advance, which would take too much memory


class Sampler:
    """Draws networks of one design space, for images of `resolution` x `resolution` pixels."""

    def __init__(self, space: Space, num_classes: int = 1000, resolution: int = 224) -> None:
        self.space = space
        self._num_classes = num_classes
        self._resolution = resolution
        self._digest = space.digest
        self._uniforms = sum(space.stages if parameter.per_stage else 1 for parameter in space.parameters)
        self.conditions = sorted(space.conditions, key=lambda one: bool(one.names & set(COSTS)))
        """As they are evaluated: those on costs last."""
        self._cheap = [one for one in space.conditions if not one.names & set(COSTS)]
        self._costly = [one for one in space.conditions if one.names & set(COSTS)]
        self._of_stages = [one for one in space.conditions if one.names == {"stages"}]

    def sample(self, seed: int, index: int) -> Member:
        """The network `index`. Raises UserError if hardly any fulfills the conditions, naming the one that rejects."""
        rejected: Counter[str] = Counter()
        last_problem = ""
        for outcome in self._outcomes(seed, index):
            if isinstance(outcome, Member):
                return outcome
            reason, _, problem = outcome.partition(_BECAUSE)
            last_problem = problem or last_problem
            rejected[reason] += 1
        reason, times = rejected.most_common(1)[0]
        example = f" ({last_problem})" if reason == _UNFIT else ""
        raise UserError(
            f"{self.space.name}: none of {_MAX_DRAWS:,} networks fulfills all conditions; {times / _MAX_DRAWS:.1%} of "
            f"them fail at: {reason}{example}; widen the conditions or the ranges"
        )

    def accepted(self, seed: int, draws: int) -> int:
        """How many of the first `draws` fulfill the conditions."""
        return sum(isinstance(outcome, Member) for outcome in islice(self._outcomes(seed, 0), draws))

    def _outcomes(self, seed: int, index: int) -> Iterator[Member | str]:
        """Draw again and again: each time the network, or why it is none."""
        keys = seed, Stream.SPACE, self._digest, index
        for start in range(0, _MAX_DRAWS, _BATCH):
            attempts = [[number] for number in range(start, start + _BATCH)]
            rows = uniform(*keys, attempts, range(self._uniforms)).tolist()
            batch = [self._values(iter(row)) for row in rows]
            for drawn, reason in zip(batch, self._wrong_stages(batch), strict=True):
                yield reason or self.build(index, drawn)

    def _wrong_stages(self, batch: Sequence[Mapping[str, Any]]) -> list[str]:
        """For each draw of RegNets the condition on `stages` that it fails, "" for none.

        `build` would find the same: most draws end here, a batch at a time, before anything is built.
        """
        none = [""] * len(batch)
        if self.space.network != "regnet" or not self._of_stages:
            return none
        try:
            options = [{**self.space.fixed, **self._with_derived(drawn)} for drawn in batch]
            depth, *others = np.array([[one[name] for name in _LINE] for one in options], np.float64).T
            if depth.max() > _DEEPEST:
                return none
            with np.errstate(all="ignore"):  # as of w0=0, which `build` refuses
                counts = count_stages(depth, *others).tolist()
            wrong = {count: self._first_wrong({"stages": count}) for count in set(counts)}
        except (UserError, KeyError, TypeError, ValueError):
            return none  # there is no such network or condition: `build` says why, if it gets there
        return [wrong[count] for count in counts]

    def _first_wrong(self, known: Mapping[str, int]) -> str:
        return next((one.text for one in self._of_stages if not one.evaluate(known)), "")

    def _values(self, uniforms: Iterator[float]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for parameter in self.space.parameters:
            if parameter.per_stage:
                drawn = [parameter.range.draw(next(uniforms)) for _ in range(self.space.stages)]
                if parameter.order:  # a sorted list is as likely as all its permutations together
                    drawn.sort(key=float, reverse=parameter.order == "falling")
                values[parameter.name] = drawn
            else:
                values[parameter.name] = parameter.range.draw(next(uniforms))
        return values

    def _with_derived(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        return {**drawn, **{name: one.evaluate(drawn) for name, one in self.space.derived.items()}}

    def build(self, index: int, drawn: Mapping[str, Any]) -> Member | str:
        """The network of what is `drawn`, values by the names of the space's parameters; or why it is none."""
        values = self._with_derived(drawn)
        options = self._options(values)
        try:
            config = network_config(self.space.network, **options)
        except UserError as error:
            return f"{_UNFIT}{_BECAUSE}{error}"
        known = {**values, **_shape(config)}
        for condition in self._cheap:
            if not condition.evaluate(known):
                return condition.text
        try:
            cost = network_cost(config, self._num_classes, self._resolution)
        except UserError as error:
            return f"{_UNFIT}{_BECAUSE}{error}"
        known |= {"flops": cost.flops, "params": cost.params, "activations": cost.conv_activations}
        for condition in self._costly:
            if not condition.evaluate(known):
                return condition.text
        return Member(
            space=self.space.name, index=index, network=self.space.network, options=options,
            parameters=dict(_flat(values)), flops=cost.flops, params=cost.params, activations=cost.conv_activations,
        )  # fmt: skip

    def _options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        chosen = {**self.space.fixed, **values}
        per_stage = stage_options(self.space.network)
        frame = {name: value for name, value in chosen.items() if name not in per_stage}
        if not per_stage:
            return frame
        stages = [
            {
                name: value[number] if isinstance(value, list) else value
                for name, value in chosen.items()
                if name in per_stage
            }
            for number in range(self.space.stages)
        ]
        if self.space.network == "densenet":
            return {**frame, "depths": [stage["depth"] for stage in stages]}
        for stage in stages:
            ratio, group = stage.get("bottleneck_ratio", 1), stage.get("group_width", 1)
            if "width" in stage:
                stage["width"], stage["group_width"] = adjust_width(stage["width"], ratio, group, "pycls")
        return {**frame, "stages": stages}


def _shape(config: DenseNetConfig | RegNetConfig | AnyNetConfig) -> dict[str, Any]:
    """What conditions can ask of any network."""
    if isinstance(config, DenseNetConfig):
        return {"stages": len(config.depths), "blocks": sum(config.depths), "depths": config.depths, "widths": ()}
    stages = config.stages() if isinstance(config, RegNetConfig) else config.stages
    depths, widths = [stage.depth for stage in stages], [stage.width for stage in stages]
    return {"stages": len(stages), "blocks": sum(depths), "depths": depths, "widths": widths}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    for name, value in values.items():
        if isinstance(value, list):
            yield from ((f"{name}.{number}", one) for number, one in enumerate(value, 1))
        else:
            yield name, value
