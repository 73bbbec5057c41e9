"""Make a validation split where there is none."""

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from distrain.data.shards.source_images import SourceImages


def hold_out(sources: SourceImages, fraction: float) -> tuple[SourceImages, SourceImages]:
    """Split images into those for training and a `fraction` of every class for validation, at least one if it has two.

    The choice depends on the images' names and labels alone: it is the same on every machine, and an image that is
    added or removed moves few others. Of multi-label data, the rarest class is split first, and each other one by what
    is left of it, so that fractions are not exact (Sechidis et al. 2011); images without labels are a class, too.
    """
    hashes = [sha256(name.encode(errors="surrogateescape")).digest() for name in sources.names]
    labels = sources.label.reshape(len(sources), -1)
    held, decided = np.zeros((2, len(sources)), np.bool_)
    classes, counts = np.unique(labels[(labels >= 0) | (np.arange(labels.shape[1]) == 0)], return_counts=True)
    for label in classes[np.argsort(counts, kind="stable")]:
        has_label = labels[:, 0] == label if label < 0 else (labels == label).any(axis=1)
        members, left = np.flatnonzero(has_label), np.flatnonzero(has_label & ~decided)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1) - int(held[members].sum())
        held[sorted(left.tolist(), key=hashes.__getitem__)[: max(count, 0)]] = True
        decided |= has_label
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
