"""What a sweep knows of its members."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RUN_KEYS = ("run.name", "run.dir", "train.stop_epoch", "track.parent", "track.params")
"""Settings that a sweep chooses for each of its runs."""
Status = Literal["waiting", "running", "done", "failed", "pruned"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network of a design space, or one choice of settings, and what its run reached so far."""

    space: str
    """Name of the design space; `tune` where settings are varied."""
    index: int
    """i of the sample: the network is a function of the space, the seed and i. Of a search by optuna: the trial."""
    network: str
    """The name that `distrain.models.build` knows: regnet, anynet or densenet."""
    options: Mapping[str, Any]
    """The network's options."""
    parameters: Mapping[str, Any]
    """What was drawn or derived, by name; of stage 1, 2, ... as `width.1`, `width.2`, ..."""
    flops: int
    """Multiply-adds for one image."""
    params: int
    activations: int
    """Output elements of all convolutions for one image (Radosavovic et al. 2020, section 3.1)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its run beside the network's, by dotted key."""
    status: Status = "waiting"
    error: float | None = None
    """Fraction of the validation images that are misclassified at the end; None until it is known."""
    seconds: float | None = None
    """Measured training time of one step."""
    reason: str = ""
    """Why it failed."""

    @property
    def name(self) -> str:
        """Of its run: unique within a sweep."""
        return f"{self.space}-{self.index:06d}"

    @property
    def arguments(self) -> list[str]:
        """What distinguishes its run, as key=value."""
        own = {"model.name": self.network, "model.options": self.options, **self.settings}
        return [override(key, value) for key, value in own.items()]


def by_space(members: Iterable[Member]) -> dict[str, list[Member]]:
    """Members by the name of their space, in their order."""
    spaces: dict[str, list[Member]] = {}
    for member in members:
        spaces.setdefault(member.space, []).append(member)
    return spaces


def override(key: str, value: Any) -> str:
    """A setting as key=value, as a run's command line has it."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"
