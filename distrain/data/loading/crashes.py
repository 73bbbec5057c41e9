"""After a crash on this host: find the images that crash their decoder, and quarantine them."""

import logging

import torch

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.in_flight import InFlight, in_flight_folder, take_leftovers
from distrain.data.loading.quarantine import Quarantine
from distrain.data.loading.vetting import find_crashing
from distrain.data.storage.private import create_tmp_folder
from distrain.data.storage.store import DataError, Store
from distrain.errors import UserError

_log = logging.getLogger(__name__)


def open_in_flight(config: Config, split: str) -> InFlight | None:
    """Record what this process decodes for a split; None, with a warning, if that is not possible on this host."""
    try:
        return InFlight(in_flight_folder(create_tmp_folder("decoding"), config.run.folder), split)
    except (OSError, UserError) as error:
        _log.warning("images that crash a decoder will not be found: %s", error)
        return None


def quarantine_crashing(
    config: Config, loader: str, index: Index, store: Store, quarantine: Quarantine, device: torch.device
) -> None:
    """Try what processes of this run were decoding on this host when they crashed, and quarantine what crashes again.

    Raises UserError or TemporaryError if the quarantine cannot be written.
    """
    try:
        left = take_leftovers(in_flight_folder(create_tmp_folder("decoding"), config.run.folder), quarantine.split)
    except (OSError, UserError):  # reported by open_in_flight
        return
    images = []
    for crop in left:
        if crop.sample < len(index):
            try:
                shape = int(index.height[crop.sample]), int(index.width[crop.sample])
                images.append((crop, store.read(crop.sample), shape))
            except DataError:  # it is not decoded then
                continue
    if not images:
        return
    _log.warning("the last start crashed while it decoded %d images: trying them one by one", len(images))
    for sample, reason in find_crashing(images, loader, config.data, device).items():
        shard = index.shards[int(index.shard[sample])].name
        what = f"{shard} at {int(index.offset[sample])}: {reason}"
        quarantine.add_crashing(sample, int(index.crc32[sample]), what)
        _log.warning("%s: it is quarantined", what)
