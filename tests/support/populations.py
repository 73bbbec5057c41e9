"""Synthetic populations of design spaces."""

from typing import Any

from distrain.sweep.population import Member


def member(index: int, error: float | None = None, **changes: Any) -> Member:
    """A RegNet that is done if its error is given."""
    options = {"depth": 12, "w0": 24, "wa": 24.0, "wm": 2.5, "group_width": 8}
    values: dict[str, Any] = {
        "space": "regnetx",
        "index": index,
        "network": "regnet",
        "options": options,
        "parameters": {"depth": 12},
        "flops": 400_000_000,
        "params": 5_000_000,
        "activations": 3_000_000,
        "status": "waiting" if error is None else "done",
        "error": error,
    }
    return Member(**{**values, **changes})
