"""What a run decides once, by measurement or out of necessity, and keeps through every restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distrain.checkpoint import newest_step
from distrain.errors import UserError
from distrain.files import read_json, translated_errors, write_json

_TYPES = {
    "loader": str, "dense_block": str, "memory_format": str, "recompute_level": int, "lane_splits": int,
    "skipped_steps": list,
}  # fmt: skip
_CURE = "restore it; or write {} to it, and the run measures and decides again, which may change its results"


class RunDecisions:
    """Named decisions of a run, in its folder: decisions.json, and a copy in case that is damaged, as other decisions
    would change the results.

    Its methods raise UserError if both are damaged or cannot be used, TemporaryError if that may pass.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = folder / "decisions.json", folder / "decisions.copy.json"

    def get(self, name: str, decide: Callable[[], Any]) -> Any:
        """Return the decision made before, or else make it by calling `decide`."""
        if name not in self._read():
            self.set(name, decide())
        return self._read()[name]

    def __contains__(self, name: str) -> bool:
        return name in self._read()

    def set(self, name: str, value: Any) -> None:
        """Make or replace a decision."""
        decisions = {**self._read(), name: value}
        with translated_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._paths:
                write_json(path, decisions)

    def _read(self) -> dict[str, Any]:
        problems = []
        for path in self._paths:
            try:
                with translated_errors(path):
                    decisions = read_json(path, _CURE)
                    exists = path.exists()
            except UserError as error:
                problems.append(error)
                continue
            if any(type(value) is not _TYPES.get(name) for name, value in decisions.items()):
                problems.append(UserError(f"{path}: holds something else than decisions: {_CURE}"))
            elif exists:
                return decisions
        if problems:
            raise problems[0]
        with translated_errors(self._folder):
            if newest_step(self._folder / "checkpoints"):  # a run decides before its first step
                raise UserError(f"{self._paths[0]}: missing: {_CURE}")
        return {}
