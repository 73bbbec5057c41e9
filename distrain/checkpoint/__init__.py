"""Checkpoints: committed atomically, verified before use, independent of strategy and number of ranks."""

from distrain.checkpoint.files import (
    MANIFEST,
    Snapshot,
    committed,
    newest_manifest,
    newest_step,
    read,
    read_best,
    verify,
    weights_digest,
)
from distrain.checkpoint.saver import Checkpointer, check_identity

__all__ = [
    "MANIFEST",
    "Checkpointer",
    "Snapshot",
    "check_identity",
    "committed",
    "newest_manifest",
    "newest_step",
    "read",
    "read_best",
    "verify",
    "weights_digest",
]
