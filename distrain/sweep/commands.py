"""`sweep run` and `sweep tune`: members are sampled or proposed, trained, and reported."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from distrain import config
from distrain.arguments import run_arguments
from distrain.config import Config
from distrain.data.loading.setup import load_indexes
from distrain.errors import EXIT_STOPPED, UserError
from distrain.files import translated_errors
from distrain.sweep.halving import Halving
from distrain.sweep.population import RUN_KEYS, Member, override
from distrain.sweep.publish import publish
from distrain.sweep.runner import Runner, Slot, share_machine
from distrain.sweep.sampling import Sampler
from distrain.sweep.search_space import SearchSpace
from distrain.sweep.space import Space
from distrain.sweep.sweep import Sweep, sample_members
from distrain.sweep.tuner import Tuner, load_optuna, only_tuner

_NETWORK_KEYS = (*RUN_KEYS, "model.name", "model.options")

_info = partial(print, flush=True)


def run(args: argparse.Namespace, spaces: Sequence[Space], overrides: Sequence[str]) -> int:
    """`sweep run`: train the first networks of design spaces. `overrides`: settings of all runs. Raises UserError."""
    args.overrides = list(overrides)
    _refuse_keys(overrides, _NETWORK_KEYS, "chooses it for each network")
    shared = config.load(args.config, [*overrides, _run_dir(args), "run.name=member", "model.name=regnet"])
    samplers = [Sampler(space, shared.model.num_classes, shared.data.image_size) for space in spaces]
    halving = _read_halving(args, shared.train.epochs)
    if halving.epochs and args.member is not None:
        raise UserError("--member trains one network, and --halve-at waits for all of them: leave one out")
    load_indexes(shared)  # a mistake in it would fail every member
    with translated_errors(args.out):
        members = sample_members(samplers, args.seed, args.n)
        sweep = Sweep.create(args.out, members, _identity(shared, _NETWORK_KEYS), halving)
        chosen = sweep.trained
        if args.member is not None:
            if args.member >= len(sweep.members):
                raise UserError(f"--member {args.member}: the sweep has {len(sweep.members)} members, from 0 on")
            chosen = [sweep.twin(sweep.members[args.member])]
        slots = share_machine(args.workers, torch.cuda.device_count())
        _info(f"{args.out}: {len(sweep.members)} networks, {len(chosen)} to train here, {len(slots)} at a time")
        return _train(args, sweep, shared, slots, chosen)


def tune(args: argparse.Namespace) -> int:
    """`sweep tune`: search settings, by optuna or by successive halving. Raises UserError."""
    _refuse_keys(args.overrides, RUN_KEYS, "sets it")
    space = SearchSpace(args.config, [*args.overrides, _run_dir(args)], args.vary)
    halving = _read_halving(args, space.config.train.epochs)
    settings = _identity(space.config, RUN_KEYS)
    settings |= {"--seed": args.seed, **{f"--vary {key}": text for key, text in space.texts.items()}}
    load_indexes(space.config)  # a mistake in it would fail every member
    slots = share_machine(args.workers, torch.cuda.device_count())
    with translated_errors(args.out):
        _info(f"{args.out}: {args.n} members, {len(slots)} at a time")
        if args.halve_at:
            drawn = [space.member(index, space.draw(args.seed, index)) for index in range(args.n)]
            sweep = Sweep.create(args.out, drawn, settings, halving)
            code = _train(args, sweep, space.config, slots)
        else:
            load_optuna()
            with only_tuner(args.out):
                sweep = Sweep.create(args.out, None, settings, halving)
                tuner = Tuner(sweep, space, args.seed, args.n, len(slots))
                code = _train(args, sweep, space.config, slots, propose=tuner.propose)
        _info(_describe_best(sweep.current(), space.default))
    return code


def _train(
    args: argparse.Namespace,
    sweep: Sweep,
    shared: Config,
    slots: Sequence[Slot],
    members: Sequence[Member] | None = None,
    **hook: Callable[[], int],
) -> int:
    batch = {"batch.lanes": shared.batch.lanes, "batch.per_lane": shared.batch.per_lane}
    arguments = [*run_arguments(args), "track.models=false"]
    code = Runner(sweep, members, arguments, batch, slots, _info, **hook).run()
    if code != EXIT_STOPPED and not sweep.due():
        publish(sweep, shared, _info)
    return code


def _run_dir(args: argparse.Namespace) -> str:
    return f"run.dir={args.out / 'runs'}"


def _identity(shared: Config, without: tuple[str, ...]) -> dict[str, Any]:
    """What must not change when a sweep continues."""
    return {key: value for key, value in config.fixed_settings(shared).items() if key not in without}


def _describe_best(members: Sequence[Member], default: Mapping[str, Any] | None) -> str:
    """The best settings and their error, beside that of the `default` settings, where they stopped if pruned."""
    done = [member for member in members if member.status == "done" and member.error is not None]
    if not done:
        return "no member is done yet"
    best = min(done, key=lambda member: member.error or 0.0)
    settings = " ".join(override(key, value) for key, value in best.parameters.items())
    known = [member for member in members if member.parameters == default and member.error is not None]
    own = f"{known[0].error:.2%}{' when pruned' if known[0].status == 'pruned' else ''}" if known else "unknown"
    return f"best: {settings}: error {best.error:.2%}; with the configuration's own: {own}"


def _refuse_keys(overrides: Sequence[str], keys: tuple[str, ...], reason: str) -> None:
    for text in overrides:
        if text.partition("=")[0].strip().startswith(keys):
            raise UserError(f"{text}: the sweep {reason}: leave it out")


def _read_halving(args: argparse.Namespace, epochs: float) -> Halving:
    if not args.halve_at:
        return Halving()
    try:
        ends = tuple(float(text) for text in args.halve_at.split(","))
    except ValueError as error:
        raise UserError(f"--halve-at {args.halve_at}: write epochs, such as 1,3") from error
    if list(ends) != sorted({*ends}) or not 0 < ends[0] <= ends[-1] < epochs:
        raise UserError(f"--halve-at {args.halve_at}: must increase, from above 0 to below train.epochs={epochs:g}")
    return Halving(ends, args.fraction)
