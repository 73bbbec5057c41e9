"""Write a classifier as a folder that MLflow loads and serves: code, weights as .safetensors, pinned requirements."""

import base64
import io
import logging
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import distrain
from distrain.export.classifier import Classifier
from distrain.models import save_weights

WEIGHTS = "weights.safetensors"
REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "pillow", "safetensors", "omegaconf", "pyyaml")
"""What a served model imports: the dependencies of distrain without those of training."""

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # clusters have no outbound network, and sending it is the user's choice
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the sender retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def prepare_mlflow() -> None:
    """Import MLflow with the settings for how it reports and retries that the environment does not give."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    import mlflow  # noqa: F401, which sets up logging

    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def write_mlflow(classifier: Classifier, folder: Path, **about: Any) -> None:
    """Write a classifier to a new folder, for `mlflow models serve -m` and `mlflow.pyfunc.load_model`.

    The model takes a column of encoded images, base64 text or bytes. `about` are more fields of MLflow's Model, such as
    run_id. Raises UserError or OSError if the folder cannot be written.
    """
    folder.mkdir()  # MLflow would create its parents too
    prepare_mlflow()
    from mlflow import pyfunc
    from mlflow.models import Model

    package = Path(distrain.__file__).parent
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = Path(scratch) / WEIGHTS
        save_weights(classifier.network, weights, record=classifier.to_record())
        pyfunc.save_model(
            path=str(folder),
            mlflow_model=Model(metadata=classifier.to_record(), **about),
            python_model=str(package / "export" / "served.py"),
            code_paths=[str(package)],
            artifacts={"weights": str(weights)},
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
            signature=_signature(),
            input_example=([_example()], {"top": 5}),
        )


def _signature() -> Any:
    """Encoded images -> a label with its score, and the likeliest classes with theirs; params: how many of them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    outputs = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.double, "score"),
        ColSpec(Array(DataType.string), "classes"),
        ColSpec(Array(DataType.double), "scores"),
    ]
    return ModelSignature(
        Schema([ColSpec(DataType.string)]),
        Schema(outputs),
        ParamSchema([ParamSpec("top", DataType.long, 5)]),
    )


def _example() -> str:
    """A small PNG in base64."""
    from PIL import Image

    png = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()
