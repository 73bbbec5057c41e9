"""Make a validation split where there is none."""

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.source_images import SourceImages


def hold_out(sources: SourceImages, fraction: float) -> tuple[SourceImages, SourceImages]:
    """Split images into those for training and a `fraction` of every class for validation, at least one if it has two.

    The choice depends on the images' names alone: it is the same on every machine, and an image that is added or
    removed moves few others.
    """
    hashes = [sha256(name.encode(errors="surrogateescape")).digest() for name in sources.names]
    held = np.zeros(len(sources), np.bool_)
    for label in np.unique(sources.label):
        members = np.flatnonzero(sources.label == label)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[sorted(members.tolist(), key=hashes.__getitem__)[:count]] = True
    return _subset(sources, ~held), _subset(sources, held)


def _subset(sources: SourceImages, chosen: NDArray[np.bool_]) -> SourceImages:
    rows = np.flatnonzero(chosen)
    return SourceImages(
        [sources.names[row] for row in rows],
        [sources.paths[row] for row in rows],
        sources.offset[rows],
        sources.size[rows],
        sources.label[rows],
        sources.classes,
        sources.changed[rows],
    )
