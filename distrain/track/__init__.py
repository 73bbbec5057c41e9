"""Reports of a run: the console, MLflow, and the plot of its curves. Only the main rank reports."""

import shlex
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from distrain.config import NO_MLFLOW, Config, flatten, map_text, to_dict, to_yaml
from distrain.errors import StaleAttemptError, Stopped
from distrain.files import translated_errors, write_atomically
from distrain.masking import mask_secrets
from distrain.track.console import Console
from distrain.track.mlflow import FINISHED, MlflowSender, Reported
from distrain.track.plot import plot_curves
from distrain.track.spool import Spool
from distrain.track.uri import SQLITE, tracking_uri

_TIMEOUT_S = 50.0  # for a slow MLflow server at the end of a run; other ranks wait for a minute or more
_TIMEOUT_STOPPING_S = 5.0  # a scheduler that asked to stop kills soon


class Tracker(Protocol):
    """Reports of a run. A context manager: its end reports how the run ended."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, tags: Mapping[str, str]) -> None:
        """Begin to report, now that training begins; until then only `info` works. Calls after the first do nothing.

        `tags` are set on the MLflow run.

        Raises UserError or TemporaryError if the run's folder cannot be written.
        """
        ...

    def info(self, line: str) -> None:
        """Print one line on the console."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report metrics after `step` updates; those that were reported before a restart are skipped."""
        ...

    def sync(self) -> None:
        """Flush the metrics to disk: no later start reports those before the checkpoint from which it resumes.

        Raises OSError.
        """
        ...

    def advance(self, step: int) -> None:
        """Update the progress bar."""
        ...

    @property
    def view_hint(self) -> str:
        """Where to view the run, with the command if there is one."""
        ...


def open_tracker(config: Config, is_main: bool, steps: int) -> Tracker:
    """The tracker of a run of `steps` steps: it reports on the main rank, and does nothing on the others.

    Raises UserError or TemporaryError, on the main rank, if the run's folder cannot be written.
    """
    return MainTracker(config, steps) if is_main else NullTracker()


class NullTracker:
    """Reports nothing."""

    view_hint = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, tags: Mapping[str, str]) -> None: ...

    def info(self, line: str) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def sync(self) -> None: ...

    def advance(self, step: int) -> None: ...


class MainTracker:
    """Reports to the console, the run's folder and MLflow."""

    def __init__(self, config: Config, steps: int) -> None:
        self._config = config
        self._folder = config.run.folder
        self._uri = tracking_uri(config)
        self._config_file = self._folder / "config.yaml"
        self._console = Console(steps)
        self._spool: Spool | None = None
        self._mlflow: MlflowSender | None = None

    def begin(self, tags: Mapping[str, str]) -> None:
        if self._spool is not None:
            return
        with translated_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._config_file, to_yaml(self._config), private=True)
            self._spool = Spool(self._folder / "metrics.jsonl")
        if self._uri != NO_MLFLOW:
            reported = Reported(
                uri=self._uri,
                experiment=self._config.track.experiment,
                name=self._config.run.name,
                folder=self._folder,
                params=self._params(),
                tags=tags,
                parent=self._config.track.parent,
                models=self._config.track.models,
                register=self._config.track.register,
            )
            self._mlflow = MlflowSender(reported, self._spool, self._console.info)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._console.close()
        if self._spool is None or isinstance(error, StaleAttemptError):
            return  # the reports are an earlier or a newer attempt's
        artifacts = [self._config_file]
        try:
            artifacts.append(plot_curves(self._spool.entries(), self._folder / "curves.png"))
        except OSError as error:  # must not hide how the run ended
            self._console.info(f"{self._folder}/curves.png cannot be written: {error.strerror}")
        stopping = kind is not None and issubclass(kind, Stopped)
        status = FINISHED if kind is None else "SCHEDULED" if stopping else "FAILED"
        if self._mlflow is not None:
            timeout = _TIMEOUT_S if kind is None else _TIMEOUT_STOPPING_S
            self._mlflow.close(status, artifacts, timeout)

    def info(self, line: str) -> None:
        self._console.info(line)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._console.report(step, metrics)
        if self._spool is not None and self._spool.append(step, metrics) and self._mlflow is not None:
            self._mlflow.notify()

    def sync(self) -> None:
        if self._spool is not None:
            self._spool.sync()

    def advance(self, step: int) -> None:
        self._console.advance(step)

    def _params(self) -> dict[str, Any]:
        settings = to_dict(self._config)
        more = settings["track"].pop("params")
        return map_text(mask_secrets, {**flatten(settings), **more})

    @property
    def view_hint(self) -> str:
        if self._uri == NO_MLFLOW:
            return f"see {self._folder}/curves.png and metrics.jsonl"
        if self._uri.startswith((SQLITE, "file:")):
            return f"compare runs with: mlflow ui --backend-store-uri {shlex.quote(self._uri)}"
        return f"compare runs at {mask_secrets(self._uri)}"
