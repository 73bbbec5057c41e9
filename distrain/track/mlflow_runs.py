"""MLflow runs that several processes share: each finds the same one, or creates it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distrain.export.mlflow_model import prepare_mlflow
from distrain.track.uri import SQLITE

RUN_TAG = "distrain.run"
SWEEP_TAG = "distrain.sweep"


def connect(uri: str) -> Any:
    """A client of the MLflow server, or database file, at `uri`."""
    prepare_mlflow()
    from mlflow import MlflowClient

    if uri.startswith(SQLITE):
        _create_database(Path(uri.removeprefix(SQLITE).partition("?")[0]))
    return MlflowClient(uri)


def find_or_create_experiment(client: Any, uri: str, name: str, folder: Path) -> str:
    """The id of an experiment. With a database file, a new one keeps its artifacts in `folder`/mlartifacts."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    beside = (folder.resolve() / "mlartifacts").as_uri() if uri.startswith(SQLITE) else None
    return str(client.create_experiment(name, artifact_location=beside))


def find_or_create_run(client: Any, experiment: str, tag: str, value: str, name: str) -> str:
    """The id of the run that has this tag, which is running then; if several processes create it, of the first one.

    The tag exists before the run does, so that a kill in between cannot lead to a second run.
    """
    if (found := _oldest(client, experiment, tag, value)) is not None:
        client.update_run(found, status="RUNNING")
        return found
    own = str(client.create_run(experiment, tags={tag: value}, run_name=name).info.run_id)
    first = _oldest(client, experiment, tag, value) or own
    if first != own:  # another process was faster
        client.delete_run(own)
    return first


def _oldest(client: Any, experiment: str, tag: str, value: str) -> str | None:
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'")
    ordered = sorted((run.info.start_time, run.info.run_id) for run in runs)
    return str(ordered[0][1]) if ordered else None


def _create_database(path: Path) -> None:
    """Create MLflow's tables in a temporary file and link it to `path`: MLflow creates them one by one, and a database
    of which some are missing stays unusable."""
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        tmp = Path(folder) / path.name
        MlflowClient(f"{SQLITE}{tmp}").search_experiments()
        try:
            path.hardlink_to(tmp)
        except FileExistsError:  # another run created it first
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                tmp.rename(path)
