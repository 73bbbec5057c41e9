"""Reports to MLflow without ever holding up training.

A thread forwards what is in the spool. Whatever happens to the server, the spool keeps the metrics, and the
thread sends what MLflow lacks as soon as it answers, also after a restart of the run.
"""

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distrain.track.spool import Spool

_RETRY_S = 10.0
_METRICS_PER_CALL = 1000  # the REST interface takes no more
_RUN_TAG = "distrain.run"
_SQLITE = "sqlite:///"
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # clusters are closed, and it is not ours to tell
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # we try again ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MlflowSender:
    """Keeps one MLflow run in step with a spool, across restarts of the training."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        folder: Path,
        params: Mapping[str, Any],
        spool: Spool,
        warn: Callable[[str], None],
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._name = name
        self._folder = folder
        self._params = params
        self._spool = spool
        self._warn = warn
        self._news = threading.Condition()
        self._unsent = True
        self._delivered = False
        self._status: str | None = None
        self._artifacts: Sequence[Path] = ()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Say that the spool has grown."""
        with self._news:
            self._unsent = True
            self._news.notify()

    def close(self, status: str, artifacts: Sequence[Path], patience: float) -> None:
        """Send the rest and the files, and end the MLflow run; give up after `patience` seconds."""
        with self._news:
            self._status = status
            self._artifacts = artifacts
            self._unsent = True
            self._news.notify()
        self._thread.join(patience)
        if not self._delivered:
            self._warn(
                f"MLflow at {self._uri} did not take everything; the metrics are in {self._folder} and are sent "
                "when the same command runs again"
            )

    def _run(self) -> None:
        warned = False
        while True:
            try:
                _Connection(self._uri, self._experiment, self._name, self._folder, self._params).follow(self)
                self._delivered = True
                return
            except Exception as error:  # training goes on whatever MLflow does
                if not warned:
                    reason = " ".join(str(error).split())[:200]
                    self._warn(f"MLflow at {self._uri}: {reason}; training goes on, metrics are kept")
                    warned = True
                with self._news:
                    if self._status is not None:
                        return
                    self._news.wait(_RETRY_S)

    def wait(self) -> tuple[str | None, Sequence[Path]]:
        """Sleep until there is something to send; the status and files to end with, if the run is over."""
        with self._news:
            while not self._unsent:
                self._news.wait()
            self._unsent = False
            return self._status, self._artifacts

    @property
    def spool(self) -> Spool:
        return self._spool


class _Connection:
    """The MLflow run, found or made, and what it has received so far."""

    def __init__(self, uri: str, experiment: str, name: str, folder: Path, params: Mapping[str, Any]) -> None:
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        from mlflow import MlflowClient

        for chatty in ("alembic", "mlflow"):
            logging.getLogger(chatty).setLevel(logging.ERROR)
        if uri.startswith(_SQLITE):
            _create_database(Path(uri.removeprefix(_SQLITE)))
        self._client = MlflowClient(uri)
        self._run_id = self._find_or_create(experiment, name, folder, uri)
        self._received = self._ask_received()
        self._next = 0  # place in the spool up to which everything is there
        self._log_params(params)

    def follow(self, sender: MlflowSender) -> None:
        """Forward the spool until the training ends."""
        while True:
            status, artifacts = sender.wait()
            self._send(sender.spool)
            if status is not None:
                for artifact in artifacts:
                    self._client.log_artifact(self._run_id, str(artifact))
                self._client.set_terminated(self._run_id, status)
                return

    def _find_or_create(self, experiment: str, name: str, folder: Path, uri: str) -> str:
        """The MLflow run that carries this run's tag. The tag exists before the run does, so that a kill in
        between cannot lead to a second one."""
        tag = _identity(folder)
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            beside = (folder.resolve().parent / "mlartifacts").as_uri() if uri.startswith(_SQLITE) else None
            experiment_id = self._client.create_experiment(experiment, artifact_location=beside)
        else:
            experiment_id = found.experiment_id
        runs = self._client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{tag}'")
        if runs:
            run_id = str(runs[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        return str(self._client.create_run(experiment_id, tags={_RUN_TAG: tag}, run_name=name).info.run_id)

    def _ask_received(self) -> set[tuple[int, str]]:
        names = self._client.get_run(self._run_id).data.metrics
        return {(point.step, name) for name in names for point in self._client.get_metric_history(self._run_id, name)}

    def _log_params(self, params: Mapping[str, Any]) -> None:
        """MLflow refuses to change a parameter; the first value stays, as the run's identity is fixed anyway."""
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
            if (entry.step, name) not in self._received
        ]
        for start in range(0, len(missing), _METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=missing[start : start + _METRICS_PER_CALL])
        self._next += len(entries)


def _create_database(path: Path) -> None:
    """Make MLflow's tables beside their place and move them there whole: MLflow makes them one by one, and never
    gets over having been killed in between."""
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        MlflowClient(f"{_SQLITE}{draft}").search_experiments()
        with suppress(FileExistsError):  # another run was faster
            path.hardlink_to(draft)


def _identity(folder: Path) -> str:
    """A name for the run that no other run has, kept in its folder."""
    path = folder / "run.json"
    if not path.exists():
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps({"id": uuid.uuid4().hex}))
        draft.replace(path)
    return str(json.loads(path.read_text())["id"])
