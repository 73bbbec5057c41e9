"""`python -m distrain soak`: train under random faults and compare bit for bit with an uninterrupted run."""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from distrain import config
from distrain.arguments import add_run_arguments, run_arguments
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.soak.account import summarize, tabulate
from distrain.soak.plan import draw_faults
from distrain.soak.training import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train as configured under random faults: kills, freezes, hangs, exceptions, full disks and damaged "
        "checkpoints, in every phase and on every rank. Then compare the weights with those of an uninterrupted run of "
        "the same configuration. An interrupted soak resumes when the same command is run again."
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
    faults = draw_faults(args.seed, args.faults, steps, args.ranks)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(f"{steps:,} steps on {args.ranks} ranks without faults, then with {args.faults}")
    base = run_arguments(args)
    name = f"{settings.run.name}-soak"
    digests = {
        "uninterrupted": train([*base, f"run.name={name}-uninterrupted"], args.ranks),
        "soaked": train(
            [
                *base, f"run.name={name}", "resilience.attempts=0",
                f"resilience.faults=[{','.join(map(str, faults))}]",
            ],
            args.ranks,
        ),
    }  # fmt: skip
    folder = Path(settings.run.dir) / name
    fired = [json.loads(line)["fault"] for line in (folder / "faults.jsonl").read_text().splitlines()]
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    console.print(tabulate(fired))
    console.print(f"mean seconds over all restarts: {summarize(attempts)}")
    same = digests["uninterrupted"] == digests["soaked"]
    verdict = "the same bits" if same else "DIFFERENT BITS"
    console.print(
        f"{len(fired)} faults fired, {len(attempts)} attempts: {verdict}, "
        f"{digests['soaked']} and uninterrupted {digests['uninterrupted']}"
    )
    if args.json:
        args.json.write_text(json.dumps({"fired": fired, "attempts": attempts, "digests": digests}, indent=1) + "\n")
    return EXIT_DONE if same else EXIT_USER
