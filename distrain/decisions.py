"""What a run decides once, by measurement or of necessity, and keeps to when it is started again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RunDecisions:
    """Named decisions of a run, in decisions.json in its folder. Values are what JSON can hold."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "decisions.json"

    def get(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided before, or else what `decide` says now."""
        made = self._read()
        if name not in made:
            self.set(name, decide())
            made = self._read()
        return made[name]

    def set(self, name: str, value: Any) -> None:
        """Decide, or decide otherwise."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps({**self._read(), name: value}, indent=1) + "\n")
        draft.replace(self._path)

    def _read(self) -> dict[str, Any]:
        made = json.loads(self._path.read_text()) if self._path.exists() else {}
        assert isinstance(made, dict)
        return made
