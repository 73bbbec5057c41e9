"""What a run tells people: the console, MLflow, and the plot of its curves. Only the leading rank speaks."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from distrain.config import NO_MLFLOW, Config, flatten, to_dict, to_yaml, tracking_uri
from distrain.resilience.stopping import Stopped
from distrain.track.console import Console
from distrain.track.mlflow import MlflowSender
from distrain.track.plot import plot_curves
from distrain.track.spool import Spool

_PATIENCE_S = 60.0  # how long the end of a run waits for a slow MLflow server
_PATIENCE_STOPPING_S = 5.0  # a scheduler that asked to stop does not wait long before it kills


class Tracker:
    """Takes in metrics by step. A step that a run before its restart has reported is not reported again.

    A context manager: its end tells MLflow how the run ended.
    """

    def __init__(self, config: Config, is_main: bool, steps: int) -> None:
        self._leads = is_main
        self._folder = config.run.folder
        self._uri = tracking_uri(config)
        if not is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._config_file = self._folder / "config.yaml"
        self._config_file.write_text(to_yaml(config))
        self._spool = Spool(self._folder / "metrics.jsonl")
        self._console = Console(steps)
        self._mlflow: MlflowSender | None = None
        if self._uri != NO_MLFLOW:
            self._mlflow = MlflowSender(
                self._uri,
                config.track.experiment,
                config.run.name,
                folder=self._folder,
                params=flatten(to_dict(config)),
                spool=self._spool,
                warn=self._console.info,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._leads:
            return
        self._console.close()
        curves = plot_curves(self._spool.entries(), self._folder / "curves.png")
        stopping = kind is not None and issubclass(kind, Stopped)
        status = "FINISHED" if kind is None else "SCHEDULED" if stopping else "FAILED"
        if self._mlflow is not None:
            patience = _PATIENCE_S if kind is None else _PATIENCE_STOPPING_S
            self._mlflow.close(status, [self._config_file, curves], patience)

    def info(self, line: str) -> None:
        """One line for the console."""
        if self._leads:
            self._console.info(line)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics as they were after `step` updates."""
        if self._leads:
            self._console.report(step, metrics)
            if self._spool.append(step, metrics) and self._mlflow is not None:
                self._mlflow.notify()

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._leads:
            self._console.advance(step)

    @property
    def view_hint(self) -> str:
        """Where the run can be seen, with the command if there is one."""
        if self._uri == NO_MLFLOW:
            return f"see {self._folder}/curves.png and metrics.jsonl"
        if self._uri.startswith("http"):
            return f"compare runs at {self._uri}"
        return f"compare runs with: mlflow ui --backend-store-uri {self._uri}"
