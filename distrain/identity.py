"""What makes a run the same run, recorded with every checkpoint and compared before anything is resumed."""

import zlib
from pathlib import Path
from typing import Any

import torch

from distrain import __version__
from distrain.checkpoint import check_identity, newest_manifest, read_best
from distrain.checkpoint.files import set_aside_names
from distrain.config import STATE_FORMAT, Config, changeable_settings, fixed_settings, flatten, to_dict
from distrain.data.index import Index
from distrain.data.loading.setup import make_plan
from distrain.data.sampling.order import resolve_shuffle
from distrain.data.sampling.plan import Plan
from distrain.errors import UserError
from distrain.files import read_json, translated_errors, write_json
from distrain.initial import InitialWeights, open_initial_weights
from distrain.masking import mask_secrets
from distrain.parallel.consistency import require_same_start
from distrain.parallel.group import Group
from distrain.recipe.distillation import Teacher
from distrain.recipe.losses import loss_name, loss_weights
from distrain.resilience.claim import newest_attempt

_FILE = "identity.json"
_TYPES = {"format": int, "identity": dict, "versions": dict}
_INIT_DIGEST = "model.init digest"
_TEACHER_DIGEST = "distill.teacher digest"


def check_resumable(
    config: Config, train_index: Index, val_index: Index, teacher: Teacher | None, group: Group
) -> InitialWeights | None:
    """Raises UserError, on every rank, if the ranks were started differently, the newest checkpoint has other settings,
    the best one is unreadable or the initial weights do not fit. Returns those.

    Called before anything is written, so that a refused start does not disturb the run that it would resume.
    """
    settings = {key: value for key, value in flatten(to_dict(config)).items() if not key.startswith("download.")}
    require_same_start(group, settings | {_TEACHER_DIGEST: digest_of(teacher)})

    opened: list[InitialWeights] = []

    def check() -> tuple[str, str] | None:
        folder = config.run.folder / "checkpoints"
        with translated_errors(config.run.folder):
            read_best(folder)  # an unreadable file is reported now rather than at the first validation
            manifest = newest_manifest(folder)
            saved = manifest or read_json(config.run.folder / _FILE, "delete it", _TYPES)
            if manifest is None:
                require_no_lost_checkpoints(config.run.folder)
        initial = find_initial_weights(config, manifest, train_index)
        if saved:
            current = run_manifest(config, train_index, val_index, initial, teacher)
            check_identity(saved, current, changeable_settings(config), config.run.change)
            check_length(config, make_plan(config, train_index), saved.get("step", 0))
        if initial is None:
            return None
        opened.append(initial)
        return initial.source, initial.sha256

    found = group.on_main(check)
    if found is None or opened:
        return opened[0] if opened else None
    return InitialWeights(*found)


def run_manifest(
    config: Config, train_index: Index, val_index: Index, initial: InitialWeights | None, teacher: Teacher | None
) -> dict[str, Any]:
    """What a checkpoint records about its run. A run resumes only with the same identity."""
    weights = loss_weights(config.loss, train_index)
    identity = fixed_settings(config) | {
        "data.train digest": train_index.digest,
        "data.val digest": val_index.digest,
        "data.shuffle": resolve_shuffle(config.data, train_index),
        "loss.name": loss_name(config.loss, train_index),
        _INIT_DIGEST: digest_of(initial),
        _TEACHER_DIGEST: digest_of(teacher),
        "loss.class_weights digest": "" if weights is None else f"{zlib.crc32(weights.tobytes()):08x}",
    }
    return {
        "format": STATE_FORMAT,
        "identity": identity,
        "model.init": "" if initial is None else initial.source,
        "classes": list(train_index.classes),
        "class_counts": train_index.class_counts().tolist(),
        "multi_label": train_index.multi_label,
        "versions": {"distrain": __version__, "torch": torch.__version__},
    }


def digest_of(weights: InitialWeights | Teacher | None) -> str:
    """The checksum of weights, empty if there are none."""
    return "" if weights is None else weights.sha256


def format_versions(manifest: dict[str, Any]) -> str:
    """`distrain 1.0, torch 2.14`."""
    return ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())


def require_no_lost_checkpoints(folder: Path) -> None:
    """Raises UserError if an attempt at the run in `folder` began from a checkpoint, and there is none now."""
    attempt = newest_attempt(folder)
    if attempt is not None and attempt.committed > 0 and not set_aside_names(folder / "checkpoints"):
        raise UserError(
            f"{folder}/checkpoints: attempt {attempt.number} began from step {attempt.committed}, and there is no "
            "checkpoint now: restore one, or delete the run's folder to train from the beginning"
        )


def find_initial_weights(config: Config, saved: dict[str, Any] | None, train_index: Index) -> InitialWeights | None:
    """The weights that model.init names, if any; a run with a checkpoint of the same ones does not need them again."""
    if not config.model.init:
        return None
    source = mask_secrets(config.model.init)
    if saved is not None and saved.get("model.init") == source:
        return InitialWeights(source, saved["identity"][_INIT_DIGEST])
    return open_initial_weights(config, train_index.classes)


def check_length(config: Config, plan: Plan, step: int) -> None:
    """Raises UserError if a run that has done `step` updates would have to end before."""
    if step > plan.steps:
        raise UserError(
            f"train.epochs={config.train.epochs} ends at step {plan.steps}, and this run is at step {step} already: "
            "set train.epochs higher"
        )


def record_identity(folder: Path, manifest: dict[str, Any]) -> None:
    """Record in the run's `folder` with which settings it began, for a restart before there is a checkpoint.

    Raises UserError or TemporaryError if the folder cannot be written.
    """
    with translated_errors(folder):
        if not (folder / _FILE).exists():
            write_json(folder / _FILE, manifest)
