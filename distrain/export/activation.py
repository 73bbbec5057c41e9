"""Class activation maps: where in an image the evidence for a class lies (Zhou et al. 2016, section 2)."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.export.classifier import Classifier, Preprocess


@torch.no_grad()
def activation_map(classifier: Classifier, image: torch.Tensor, label: int) -> NDArray[np.float32]:
    """The evidence for class `label` in the network's view of an image, uint8 [1, 3, h, w].

    float32 [crop, crop], from 0 to 1. As both families average their last maps before the classifier, the map is exact:
    its mean is the logit up to the bias, before it is scaled.
    """
    network: Any = classifier.network
    maps = network.features(classifier.preprocess(image))
    evidence = torch.einsum("nchw,c->nhw", maps, network.head.weight[label])[None]
    side = classifier.preprocessing.crop
    smooth = torch.nn.functional.interpolate(evidence, (side, side), mode="bilinear")[0, 0]
    smooth -= smooth.min()
    return (smooth / smooth.max().clamp(min=1e-12)).numpy()


def view(preprocess: Preprocess, image: torch.Tensor) -> NDArray[np.uint8]:
    """What a network sees of an image, uint8 [1, 3, h, w] -> [crop, crop, 3]."""
    pixels = (preprocess(image) * preprocess.std + preprocess.mean).round().clamp(0, 255)
    return np.ascontiguousarray(pixels[0].byte().permute(1, 2, 0).numpy())


def overlay(pixels: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draw a map [h, w] in color over an image, uint8 [h, w, 3]."""
    from matplotlib import colormaps

    colors = colormaps["inferno"](heat)[..., :3] * 255
    return (0.5 * pixels + 0.5 * colors).astype(np.uint8)
