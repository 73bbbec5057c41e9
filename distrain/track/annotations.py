"""What MLflow shows of a run beside its metrics: tags, data sets and a description."""

import json
from collections.abc import Mapping
from typing import Any

from distrain.track.description import describe
from distrain.track.mlflow_runs import KIND_TAG, MODEL_TRAINING
from distrain.track.origin import DataSource, Origin

_LONGEST_TAG = 5000  # characters, of MLflow, as what follows
_LONGEST_NAME = 500
_LONGEST_DIGEST = 36


class Annotations:
    """Those of one MLflow run. Each is sent when it has changed."""

    def __init__(self, client: Any, run_id: str, network: str) -> None:
        self._client = client
        self._run_id = run_id
        self._network = network
        self._is_origin_sent = False
        self._described: tuple[str, float | None] | None = None

    def refresh(self, origin: Origin, newest: Mapping[str, float], step: int, status: str) -> None:
        """Send tags and data sets, once, and the description, when the run was validated or has another status.

        Raises MLflow's exceptions.
        """
        if not self._is_origin_sent:
            run = self._client.get_run(self._run_id)
            self._set_kind(run.info.experiment_id)
            self._send_tags(origin.tags, run.data.tags)
            self._send_data(origin, {tag.value for one in run.inputs.dataset_inputs for tag in one.tags})
            self._is_origin_sent = True
        described = (status, newest.get("val/loss"))
        if described != self._described:
            text = describe(self._network, origin, status, step, newest)
            self._client.set_tag(self._run_id, "mlflow.note.content", text)
            self._described = described

    def _set_kind(self, experiment: str) -> None:
        """Of an experiment that has none: with that of model training, MLflow's pages show its curves first."""
        if KIND_TAG not in self._client.get_experiment(experiment).tags:
            self._client.set_experiment_tag(experiment, KIND_TAG, MODEL_TRAINING)

    def _send_tags(self, tags: Mapping[str, str], before: Mapping[str, str]) -> None:
        """Also what is empty, if an earlier start has left something else there."""
        from mlflow.entities import RunTag

        sent = [RunTag(name, value[:_LONGEST_TAG]) for name, value in tags.items() if value or before.get(name)]
        self._client.log_batch(self._run_id, tags=sent)

    def _send_data(self, origin: Origin, known: set[str]) -> None:
        """`known`: for what the run has a data set already. It does not change when a run resumes."""
        from mlflow.entities import DatasetInput, InputTag

        inputs = [
            DatasetInput(_dataset(one), [InputTag("mlflow.data.context", one.use)])
            for one in origin.data
            if one.use not in known
        ]
        if inputs:
            self._client.log_inputs(self._run_id, inputs)


def _dataset(one: DataSource) -> Any:
    """With digest, schema and numbers, as MLflow's pages show them."""
    from mlflow.entities import Dataset

    label = {"type": "array", "items": {"type": "long"}} if one.multi_label else {"type": "long"}
    columns: dict[str, dict[str, Any]] = {"image": {"type": "binary"}, "label": label}
    scheme = one.uri.partition("://")[0] if "://" in one.uri else "local"
    is_http = scheme in ("http", "https")
    return Dataset(
        name=one.name[:_LONGEST_NAME],
        digest=one.digest[:_LONGEST_DIGEST],
        source_type="http" if is_http else scheme,
        source=json.dumps({"url" if is_http else "uri": one.uri}),
        schema=json.dumps({"mlflow_colspec": [{"name": name, "required": True, **of} for name, of in columns.items()]}),
        profile=json.dumps({"num_rows": one.samples, "num_classes": one.classes}),
    )
