"""Where a run comes from: who started it and where, with which code, on which data."""

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch

from distrain import __version__
from distrain.config import Config, map_text, own_settings
from distrain.data.index import Index
from distrain.masking import mask_secrets
from distrain.parallel.group import Group
from distrain.resilience.claim import newest_attempt

JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
"""Where schedulers say which job this is."""
_GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class DataSource:
    """A data set that a run reads."""

    use: str
    """Training or validation."""
    uri: str
    """Of its index, without secrets."""
    digest: str
    samples: int
    classes: int
    multi_label: bool

    @classmethod
    def of(cls, use: str, uri: str, index: Index) -> "DataSource":
        """The data set with this index."""
        return cls(use, mask_secrets(uri), index.digest, len(index), len(index.classes), index.multi_label)

    @property
    def name(self) -> str:
        """The name of the index file, without its suffix."""
        return PurePosixPath(urlsplit(self.uri).path if "://" in self.uri else self.uri).stem


@dataclass(frozen=True)
class Origin:
    """Where a run comes from, without secrets."""

    tags: Mapping[str, str] = field(default_factory=dict)
    """Empty where something is not known."""
    data: Sequence[DataSource] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those that differ from the defaults, by dotted key."""


def origin_of(config: Config, group: Group, indices: tuple[Index, Index], more: Mapping[str, str]) -> Origin:
    """The origin of this start of a run. `indices`: of the training and the validation data; `more`: tags to add.

    Asks git, which may take seconds. Raises OSError.
    """
    uses = (("training", config.data.train), ("validation", config.data.val))
    data = [DataSource.of(use, uri, index) for (use, uri), index in zip(uses, indices, strict=True)]
    attempt = newest_attempt(config.run.folder)
    tags = {
        **_source(),
        **_git(),
        "distrain.version": __version__,
        "distrain.torch": torch.__version__,
        "distrain.strategy": config.parallel.strategy,
        "distrain.ranks": str(group.world),
        "distrain.hosts": ", ".join(dict.fromkeys(peer.host for peer in group.peers)),
        "distrain.device": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "CPU",
        "distrain.restarts": str(attempt.number - 1 if attempt else 0),
        **{name: mask_secrets(value) for name, value in more.items()},
    }
    return Origin(tags, data, map_text(mask_secrets, own_settings(config)))


def _source() -> dict[str, str]:
    """Who has started what, under MLflow's names."""
    job = next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), "")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    words = [mask_secrets(word) for word in sys.argv[1:]]  # before quotes are added, which would hide a secret
    return {
        "mlflow.user": user,
        "mlflow.source.name": shlex.join(["python", "-m", "distrain", *words]),
        "mlflow.source.type": "JOB" if job else "LOCAL",
        "distrain.job": job,
    }


def _git() -> dict[str, str]:
    """The commit of this code and whether files differ from it, under MLflow's names; empty outside of a checkout."""
    checkout = Path(__file__).resolve().parents[2]
    commit = branch = dirty = ""
    if _ask_git(checkout, "rev-parse", "--show-toplevel") == str(checkout):  # not that of a project around a .venv
        commit = _ask_git(checkout, "rev-parse", "HEAD") or ""
        branch = _ask_git(checkout, "symbolic-ref", "--short", "--quiet", "HEAD") or ""
        changes = _ask_git(checkout, "status", "--porcelain")
        dirty = "" if changes is None else str(bool(changes)).lower()
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch,
        "mlflow.source.git.dirty": dirty,
    }


def _ask_git(checkout: Path, *words: str) -> str | None:
    """What git prints; None if there is no git, or if it fails or hangs. It takes no lock in the checkout."""
    command = ["git", "--no-optional-locks", "-c", f"safe.directory={checkout}", "-C", str(checkout), *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
            timeout=_GIT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()
