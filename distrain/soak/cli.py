"""`python -m distrain soak`: train under random faults and compare bit for bit with an uninterrupted run."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from distrain import config
from distrain.arguments import add_run_arguments, run_arguments
from distrain.checkpoint import committed, verify
from distrain.checkpoint.metadata import DamagedCheckpointError
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.resilience.claim import newest_attempt
from distrain.resilience.faults import RECORD
from distrain.soak.account import Account, find_problems, summarize, tabulate
from distrain.soak.actions import Log, SoakedRun
from distrain.soak.disk import Disk, hide_mounts, why_impossible
from distrain.soak.plan import draw_plan
from distrain.soak.training import Training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train as configured under random faults, in every phase, at any moment and on every rank: kills, freezes, "
        "hangs, exceptions, full disks, failing and slow file systems, steps of the clock, damaged checkpoints, second "
        "starts, and, as root, power cuts. Then compare the weights and losses with those of an uninterrupted run, "
        "verify all checkpoints, and compare the records of the run with what was injected: exit code 0 only if all "
        "of it is right. An interrupted soak resumes when the same command is run again."
    )
    add_run_arguments(parser)
    parser.add_argument("--faults", type=int, default=25, metavar="N", help="number of faults (default 25)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random faults (default 0)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes, one per GPU (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = config.load(args.config, args.overrides)
    config.check_ranks(settings, args.ranks)
    if args.faults < 1:
        raise UserError("--faults must be at least 1")
    steps = make_plan(settings, load_indexes(settings)[0]).steps
    if steps < 2 * args.faults:
        raise UserError(
            f"a run of {steps} steps is too short for {args.faults} faults: raise train.epochs to get at least "
            f"{2 * args.faults} steps"
        )
    why_not = why_impossible()
    faults, actions = draw_plan(args.seed, args.faults, steps, args.ranks, power_cuts=not why_not)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(f"{steps:,} steps on {args.ranks} ranks without faults, then with {args.faults}")
    console.print(f"no power cuts: {why_not}" if why_not else "power cuts lose what is not on the disk")
    base, name, folder = run_arguments(args), f"{settings.run.name}-soak", Path(settings.run.dir)
    with Training([*base, f"run.name={name}-uninterrupted"], args.ranks) as training:
        digest = training.wait()
    losses = read_losses(folder / f"{name}-uninterrupted")
    disk = None if why_not else Disk(folder / f"{name}.img", folder / f"{name}-disk")
    if disk is not None:
        hide_mounts()
        disk.mount()
        folder = disk.folder
    try:
        planned = f"resilience.faults=[{','.join(map(str, faults))}]"
        soaked = [*base, f"run.name={name}", f"run.dir={folder}", "resilience.attempts=0", planned]
        log = Log(Path(settings.run.dir) / f"{name}.jsonl")
        run = SoakedRun(soaked, args.ranks, folder / name, log, disk)
        account = read_account(folder / name, log, run.train(actions, settings.resilience.patience))
    finally:
        if disk is not None:
            disk.unmount()
    problems = find_problems(faults, actions, account, losses, digest)
    report(console, account, problems)
    if args.json:
        args.json.write_text(json.dumps({**vars(account), "uninterrupted": digest, "problems": problems}) + "\n")
    return EXIT_USER if problems else EXIT_DONE


def read_account(folder: Path, log: Log, digest: str) -> Account:
    """What the files of a soaked run say at its end."""
    newest = newest_attempt(folder)
    return Account(
        fired=read_lines(folder / RECORD), done=log.entries, attempts=read_lines(folder / "attempts.jsonl"),
        last_attempt=newest.number if newest else 0, losses=read_losses(folder), damaged=find_damaged(folder),
        digest=digest,
    )  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file of JSON lines. A kill or a power cut may leave what is none."""
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line.strip(b"\0")))
    return entries


def read_losses(folder: Path) -> dict[int, float]:
    """The training loss by step."""
    entries = [entry for entry in read_lines(folder / "metrics.jsonl") if "train/loss" in entry["metrics"]]
    return {entry["step"]: entry["metrics"]["train/loss"] for entry in entries}


def find_damaged(folder: Path) -> list[str]:
    """The names of the checkpoints that are not whole, as `checkpoints verify` finds them."""
    damaged = []
    for path in committed(folder / "checkpoints"):
        try:
            verify(path)
        except DamagedCheckpointError:
            damaged.append(path.name)
    return damaged


def report(console: Console, account: Account, problems: list[str]) -> None:
    """Print what was injected, what the restarts cost, and the verdict."""
    console.print(tabulate(account))
    console.print(f"median seconds of all restarts: {summarize(account.attempts)}")
    for problem in problems:
        console.print(f"PROBLEM: {problem}", markup=False)
    verdict = "not as it must be" if problems else "the same bits, nothing lost"
    done = sum("@" in entry["action"] and entry["problem"] is not None for entry in account.done)
    console.print(f"{len(account.fired) + done} faults, {account.last_attempt} attempts: {verdict}, {account.digest}")
