"""A classifier as MLflow loads it.

MLflow copies this file into the folder of a model and runs it there, beside a copy of the package, so that nothing is
pickled; the package itself does not import it.
"""

import base64
import binascii
from typing import Any

import pandas
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from distrain.data.image import ImageError
from distrain.export.classifier import read_image
from distrain.export.load import load
from distrain.export.predict_cli import classify

_TOP = 5  # classes of each image, as `distrain predict` gives


class ServedClassifier(PythonModel):
    """Encoded images, a column of base64 text or bytes -> the likeliest classes with their scores."""

    def load_context(self, context: Any) -> None:
        """Load the weights. MLflow calls this once."""
        self.classifier = load(context.artifacts["weights"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> pandas.DataFrame:
        """A row per image: the likeliest class and its score, and the `top` likeliest ones in descending order.

        Raises MlflowException, which a server answers with status 400, for what is not an image.
        """
        top = int((params or {}).get("top", _TOP))
        if top < 1:
            raise MlflowException.invalid_parameter_value(f"top={top} must be at least 1")
        return pandas.DataFrame([self._predict_one(*row, top) for row in enumerate(model_input.iloc[:, 0])])

    def _predict_one(self, number: int, encoded: Any, top: int) -> dict[str, Any]:
        try:
            pixels = read_image(_decode(encoded))
        except (ImageError, binascii.Error, TypeError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(f"image {number}: {error}") from error
        found, _ = classify(self.classifier, str(number), pixels, top)
        return {"label": found.classes[0], "score": found.scores[0], "classes": found.classes, "scores": found.scores}


def _decode(encoded: Any) -> bytes:
    """Raises binascii.Error, TypeError or ValueError."""
    return encoded if isinstance(encoded, bytes) else base64.b64decode(encoded, validate=True)


set_model(ServedClassifier())
