"""Chooses the faster loader for `data.loader=auto`."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import cycle, islice

import torch

from distrain.config import Config
from distrain.data.index import Index
from distrain.data.loading.loader import Loader
from distrain.data.loading.loaders import LOADERS, has_dali, require_dali
from distrain.data.loading.requests import train_requests
from distrain.data.loading.setup import make_loader, make_quarantine
from distrain.data.sampling.plan import Plan
from distrain.decisions import RunDecisions

_TRIAL_BATCHES = 8  # at least
_TRIAL_ROUNDS = 2


def choose_loader(config: Config, plan: Plan, index: Index, device: torch.device, info: Callable[[str], None]) -> str:
    """Return the configured loader, or for `auto` the fastest one on the first batches of this run.

    The decision is kept in the run's folder, because loaders round pixels differently and a resumed run must see the
    same ones. Raises UserError if the loader is not installed.
    """
    name: str = config.data.loader
    if name == "auto":
        fastest = partial(_find_fastest, config, plan, index, device, info)
        name = str(RunDecisions(config.run.folder).get("loader", fastest))
    if name == "dali":
        require_dali()
    return name


def _find_fastest(config: Config, plan: Plan, index: Index, device: torch.device, info: Callable[[str], None]) -> str:
    if not has_dali():
        info("data.loader=auto: torch, because NVIDIA DALI is not installed")
        return "torch"
    if config.train.deterministic:  # what is timed may differ between two runs
        name = "dali" if device.type == "cuda" else "torch"
        info(f"data.loader=auto: {name}, not measured because of train.deterministic")
        return name
    quarantine = make_quarantine(config, index, "train")
    rates = dict.fromkeys(LOADERS, 0.0)
    for _ in range(_TRIAL_ROUNDS):
        for name in LOADERS:
            with closing(make_loader(config, name, index, quarantine, device)) as loader:
                rates[name] = max(rates[name], _measure(config, loader, plan, index))
    best = max(rates, key=lambda name: rates[name])
    measured = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
    info(f"data.loader=auto: {best} is the fastest ({measured})")
    return best


def _measure(config: Config, loader: Loader, plan: Plan, index: Index) -> float:
    """Return the steady-state images per second of one rank.

    Batches that were decoded ahead do not count, and as many are timed as keep all threads busy to the end.
    """
    threads = config.data.threads
    requests = cycle(train_requests(config, plan, index, range(1)))
    with closing(loader.stream(requests)) as batches:
        for _ in range(max(config.data.prefetch, threads) + 1):
            next(batches)
        began = time.monotonic()
        images = sum(len(batch.labels) for batch in islice(batches, threads * math.ceil(_TRIAL_BATCHES / threads)))
        return images / (time.monotonic() - began)
