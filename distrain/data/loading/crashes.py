"""After a crash on this host: find the images that crash their decoder, and quarantine them."""

import logging
from collections.abc import Sequence
from contextlib import closing, suppress

import torch

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.in_flight import Crop, in_flight_folder, take_leftovers
from distrain.data.loading.loaders import LOADERS, has_dali
from distrain.data.loading.setup import make_quarantine
from distrain.data.loading.vetting import Image, find_crashing
from distrain.data.storage.remote import open_store
from distrain.data.storage.store import DataError
from distrain.errors import UserError

_log = logging.getLogger(__name__)


def quarantine_crashing(config: Config, splits: Sequence[tuple[str, Index]], device: torch.device) -> None:
    """Try what processes of this run were decoding on this host when they crashed, and quarantine what crashes again.

    Every rank calls this, and one of a host finds what there is. Raises UserError or TemporaryError if the quarantine
    cannot be written or the data cannot be read.
    """
    for split, index in splits:
        try:
            left = take_leftovers(in_flight_folder(config.run.folder), split)
        except (OSError, UserError):  # reported when what is decoded cannot be recorded either
            continue
        if left:
            _try(config, split, index, left, device)


def _try(config: Config, split: str, index: Index, left: Sequence[Crop], device: torch.device) -> None:
    images: list[Image] = []
    with closing(open_store(index, config.download)) as store:
        for crop in left:
            if crop.sample < len(index):
                shape = int(index.height[crop.sample]), int(index.width[crop.sample])
                with suppress(DataError):  # then it is not decoded
                    images.append((crop, store.read(crop.sample), shape))
    _log.warning("the last start crashed while it decoded %d images: trying them one by one", len(images))
    quarantine = make_quarantine(config, index, split)
    for loader in loaders_of(config):
        for sample, reason in find_crashing(images, loader, config.data, device).items():
            shard = index.shards[int(index.shard[sample])].name
            what = f"{shard} at {int(index.offset[sample])}: {reason}"
            quarantine.add_crashing(sample, int(index.crc32[sample]), what)
            _log.warning("%s: it is quarantined", what)


def loaders_of(config: Config) -> list[str]:
    """The loaders that a run may decode with on this host."""
    if config.data.loader != "auto":
        return [config.data.loader]
    return [name for name in LOADERS if name != "dali" or has_dali()]
