"""What a run decides once, by measurement or out of necessity, and keeps through every restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrain.files import read_json, write_json

_CURE = "delete it; what the run decided is measured again"


class RunDecisions:
    """Named decisions of a run, in decisions.json in its folder. Values are what JSON can hold.

    Its methods raise UserError if the file is not readable as JSON.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "decisions.json"

    def get(self, name: str, decide: Callable[[], Any]) -> Any:
        """Return the decision made before, or else make it by calling `decide`."""
        decisions = read_json(self._path, _CURE)
        if name not in decisions:
            self.set(name, decide())
            decisions = read_json(self._path, _CURE)
        return decisions[name]

    def set(self, name: str, value: Any) -> None:
        """Make or replace a decision."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {**read_json(self._path, _CURE), name: value})
