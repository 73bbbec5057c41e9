"""distrain trains DenseNet and RegNet image classifiers on many GPU nodes and never loses work.

>>> model = distrain.load("runs/mine")                          # or weights, see distrain.export.load
>>> scores = model(distrain.read_image("cat.jpg")).softmax(1)
>>> model.classes[int(scores.argmax())]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from distrain.export.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["__version__", "load", "read_image"]


def load(source: str | Path, *args: Any, **options: Any) -> "Classifier":
    """Load a classifier from a run or weights: see `distrain.export.load.load`."""
    from distrain.export.load import load

    return load(source, *args, **options)


def read_image(path: str | Path) -> "torch.Tensor":
    """Read an image file as uint8 [1, 3, h, w], RGB as stored. Raises UserError if it cannot be read."""
    from distrain.errors import UserError
    from distrain.export.images import open_images

    (image,) = open_images([str(path)])
    if image.pixels is None:
        raise UserError(f"{path}: {image.problem}")
    return image.pixels
