"""The models of a finished run in MLflow: `model`, the best one, and `final`, the last one if it is another."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from distrain import __version__
from distrain.export.load import from_weights
from distrain.export.mlflow_model import write_mlflow
from distrain.masking import mask_secrets
from distrain.models.weight_files import Weights
from distrain.sources import from_run

BEST, FINAL = "model", "final"
_SHA256 = "distrain.sha256"
_MODEL_ID = "distrain.model_id"  # not every store keeps the model of a version


def log_models(client: Any, run_id: str, folder: Path, register: str) -> Iterator[str]:
    """Log the best and the final model of the run in `folder` to an MLflow run, unless it has them, and register the
    best one under a name, if there is one. Yields what failed, in one line each."""
    try:
        best, final = from_run(folder, None, None), from_run(folder, "last", None)
        model_id = _log_once(client, run_id, BEST, best)
        if final.sha256 != best.sha256:
            _log_once(client, run_id, FINAL, final)
    except Exception as error:  # whatever MLflow or its stores raise: the run is finished all the same
        yield f"the models of this run are not logged: {in_one_line(error)}; run the same command again"
        return
    if register:
        try:
            _register_once(client, run_id, model_id, register)
        except Exception as error:  # likewise, as of a store without a registry
            yield f"track.register={register}: not registered: {in_one_line(error)}"


def in_one_line(error: BaseException) -> str:
    """The message of an error of MLflow, shortened and without secrets."""
    return mask_secrets(" ".join(str(error).split()))[:200]


def _log_once(client: Any, run_id: str, name: str, weights: Weights) -> str:
    """Log weights as a model of this name, unless they are. Returns the id of the model."""
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    for found in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}' AND name = '{name}'"):
        if str(found.status) != "READY":  # what an interrupted start has left
            client.delete_logged_model(found.model_id)
        elif found.tags.get(_SHA256) == weights.sha256:
            return str(found.model_id)
    tags = _provenance(weights)
    model_id = str(client.create_logged_model(experiment_id, name, run_id, tags, model_type="classifier").model_id)
    try:
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            write_mlflow(from_weights(weights, None, None, ()), path, run_id=run_id, model_id=model_id)
            client.log_model_artifacts(model_id, str(path))
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=int(tags["distrain.step"]))])
        client.finalize_logged_model(model_id, "READY")
    except Exception:
        with suppress(Exception):  # of the same server; the next start does it
            client.delete_logged_model(model_id)
        raise
    return model_id


def _provenance(weights: Weights) -> dict[str, str]:
    """Tags that say of which weights a model is; their source is FOLDER:STEP:KIND."""
    _, step, kind = weights.source.rsplit(":", 2)
    return {
        _SHA256: weights.sha256,
        "distrain.weights": mask_secrets(weights.source),
        "distrain.step": step,
        "distrain.kind": kind,
        "distrain.network": str(weights.record["network"]),
        "distrain.version": __version__,
    }


def _register_once(client: Any, run_id: str, model_id: str, register: str) -> None:
    """Make a logged model the newest version under a name, unless it is a version of it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(register)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{register}' AND run_id = '{run_id}'")
    if any(version.tags.get(_MODEL_ID) == model_id for version in versions):
        return
    source = client.get_logged_model(model_id).artifact_location
    tags = {_MODEL_ID: model_id}
    client.create_model_version(register, source, run_id, tags, model_id=model_id, await_creation_for=0)
