"""What a sweep knows of its members."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["waiting", "running", "done", "failed", "pruned"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network of a design space, and what its run reached so far."""

    space: str
    """Name of the design space."""
    index: int
    """i of the sample: the network is a function of the space, the seed and i."""
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
