"""Reports to MLflow without blocking training.

A thread forwards the spool. If the server fails, the spool keeps the metrics, and the thread sends what MLflow lacks
when the server answers again, also after a restart of the run.
"""

import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.errors import UserError
from distrain.files import read_json, write_json
from distrain.track.mlflow_runs import RUN_TAG, SWEEP_TAG, connect, find_or_create_experiment, find_or_create_run
from distrain.track.models import in_one_line, log_models
from distrain.track.spool import Spool

_RETRY_S = 10.0
_METRICS_PER_CALL = 1000  # limit of the REST API
FINISHED = "FINISHED"
"""The status of a run that is done, after which its models are logged."""


@dataclass(frozen=True)
class Reported:
    """A run as MLflow shows it."""

    uri: str
    experiment: str
    name: str
    folder: Path
    """Of the run, with its checkpoints."""
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    parent: str = ""
    """Name of the sweep that it belongs to, whose run is the parent; empty: none."""
    models: bool = True
    """Whether a finished run's models are logged."""
    register: str = ""
    """Name in the model registry; empty: not registered."""


class MlflowSender:
    """Keeps one MLflow run up to date with a spool, across restarts of the training."""

    def __init__(self, reported: Reported, spool: Spool, warn: Callable[[str], None]) -> None:
        self._reported = reported
        self._spool = spool
        self._warn = warn
        self._news = threading.Condition()
        self._unsent = True
        self._delivered = False
        self._hopeless = False  # no later start can deliver either
        self._status: str | None = None
        self._artifacts: Sequence[Path] = ()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Signal that the spool has grown."""
        with self._news:
            self._unsent = True
            self._news.notify()

    def close(self, status: str, artifacts: Sequence[Path], timeout: float) -> None:
        """Send the rest and the artifacts, and end the MLflow run; give up after `timeout` seconds."""
        with self._news:
            self._status = status
            self._artifacts = artifacts
            self._unsent = True
            self._news.notify()
        self._thread.join(timeout)
        if not self._delivered and not self._hopeless:
            self._warn(
                f"MLflow at {self._reported.uri} has not received everything; metrics and models are in "
                f"{self._reported.folder} and are sent when the same command runs again"
            )

    def _run(self) -> None:
        warned = False
        while True:
            try:
                _Connection(self._reported).follow(self)
                self._delivered = True
                return
            except Exception as error:  # training continues whatever MLflow does
                reason, uri = in_one_line(error), self._reported.uri
                if isinstance(error, ImportError):  # the driver of a database
                    self._hopeless = True
                    self._warn(f"MLflow at {uri}: {reason}: install it; metrics are in {self._reported.folder} only")
                    return
                if not warned:
                    self._warn(f"MLflow at {uri}: {reason}; training continues, metrics are kept")
                    warned = True
                with self._news:
                    if self._status is not None:
                        return
                    self._news.wait(_RETRY_S)

    def send_models(self, client: Any, run_id: str) -> None:
        """Log the models of the finished run, unless they are not wanted. What fails is reported in one line, and sent
        by a later start."""
        if not self._reported.models:
            return
        for problem in log_models(client, run_id, self._reported.folder, self._reported.register):
            self._warn(f"MLflow at {self._reported.uri}: {problem}")

    def wait(self) -> tuple[str | None, Sequence[Path]]:
        """Wait until there is something to send. Returns the final status, if the run is over, and artifacts."""
        with self._news:
            while not self._unsent:
                self._news.wait()
            self._unsent = False
            return self._status, self._artifacts

    @property
    def spool(self) -> Spool:
        return self._spool


class _Connection:
    """The MLflow run, found or created, and what it has received so far."""

    def __init__(self, reported: Reported) -> None:
        self._client = connect(reported.uri)
        self._run_id = self._find_or_create(reported)
        self._received = self._fetch_received()
        self._next = 0  # number of the first spool entry that is not sent
        self._log_params(reported.params)
        for key, value in reported.tags.items():
            self._client.set_tag(self._run_id, key, value)

    def follow(self, sender: MlflowSender) -> None:
        """Forward the spool until the training ends."""
        while True:
            status, artifacts = sender.wait()
            self._send(sender.spool)
            if status is not None:
                for artifact in artifacts:
                    self._client.log_artifact(self._run_id, str(artifact))
                self._client.set_terminated(self._run_id, status)
                if status == FINISHED:
                    sender.send_models(self._client, self._run_id)
                return

    def _find_or_create(self, reported: Reported) -> str:
        experiment = find_or_create_experiment(self._client, reported.uri, reported.experiment, reported.folder.parent)
        run_id = find_or_create_run(self._client, experiment, RUN_TAG, _identity(reported.folder), reported.name)
        if reported.parent:
            parent = find_or_create_run(self._client, experiment, SWEEP_TAG, reported.parent, reported.parent)
            self._client.set_tag(run_id, "mlflow.parentRunId", parent)
        return run_id

    def _fetch_received(self) -> set[tuple[int, str, str]]:
        names = self._client.get_run(self._run_id).data.metrics
        return {
            (point.step, name, _value_key(point.value))
            for name in names
            for point in self._client.get_metric_history(self._run_id, name)
        }

    def _log_params(self, params: Mapping[str, Any]) -> None:
        """MLflow refuses to change a parameter, so the first value stays."""
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._run_id, params=new[start : start + 100])

    def _send(self, spool: Spool) -> None:
        from mlflow.entities import Metric

        entries = spool.entries(self._next)
        missing = [
            Metric(name, value, entry.time, entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
            if (entry.step, name, _value_key(value)) not in self._received
        ]
        for start in range(0, len(missing), _METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=missing[start : start + _METRICS_PER_CALL])
        self._next += len(entries)


def _value_key(value: float) -> str:
    """A float64 as it is, and one for all that databases cannot hold, which they return as something else."""
    return repr(value) if abs(value) < sys.float_info.max else "not finite"


def _identity(folder: Path) -> str:
    """A unique id of the run, kept in its folder. A copy of the folder is another run, and a moved one is not."""
    path, own = folder / "run.json", str(folder.resolve())
    found = read_json(path, "delete it; the run is then reported as a new MLflow run")
    kept = found if "id" in found and not _is_copy(found, folder) else {"id": uuid.uuid4().hex}
    if kept.get("folder") != own:
        kept = {"id": kept["id"], "folder": own}
        write_json(path, kept)
    return str(kept["id"])


def _is_copy(found: dict[str, Any], folder: Path) -> bool:
    """Whether the folder in which an id was recorded is another one and still has it."""
    original = Path(str(found.get("folder", folder)))
    try:
        if original.samefile(folder):
            return False
        return read_json(original / "run.json", "").get("id") == found["id"]
    except (OSError, UserError):
        return False
