"""`python -m distrain soak`: train under random faults and compare bit for bit with an uninterrupted run."""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile
from typing import Any

from rich.console import Console
from rich.table import Table

from distrain import config
from distrain.arguments import add_run_arguments, run_arguments
from distrain.data.loading.setup import load_indexes, make_plan
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.lifetime import tied
from distrain.parallel.group import RELIABLE_RESTARTS
from distrain.resilience.faults import Fault, parse_fault

# Faults that must not change a run's numbers. Each is followed by a restart; damage to a checkpoint by a kill first.
_RANDOM = {
    "train.step": ("sigkill", "sigstop", "exception", "oom", "exit", "sigterm", "hang"),
    "data.request": ("hang", "exception"),
    "evaluate.batch": ("sigkill", "sigstop", "exception", "hang", "exit", "sigterm"),
    "checkpoint.stage": ("sigkill", "exception", "exit"),
    "checkpoint.write": ("sigkill", "exit", "ioerror", "diskfull", "sigterm"),
    "checkpoint.manifest": ("sigkill", "exit", "ioerror"),
    "checkpoint.rename": ("sigkill", "exit"),
    "checkpoint.commit": ("sigkill", "flip", "truncate"),
}
_MAIN_RANK_ONLY = ("checkpoint.manifest", "checkpoint.rename")
_RESTARTS = 1000


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
        "uninterrupted": _train([*base, f"run.name={name}-uninterrupted"], args.ranks),
        "soaked": _train(
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


def draw_faults(seed: int, count: int, steps: int, ranks: int) -> list[Fault]:
    """`count` random faults, spread over the run, in order of their steps."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    for number in range(count):
        first, last = number * steps // count, (number + 1) * steps // count - 1
        failpoint = draw.choice(list(_RANDOM))
        kind = draw.choice(_RANDOM[failpoint])
        rank = 0 if failpoint in _MAIN_RANK_ONLY or kind in ("flip", "truncate") else draw.randrange(ranks)
        faults.append(Fault(kind, failpoint, draw.randint(first, last), rank))
    return faults


def tabulate(fired: list[str]) -> Table:
    """A row per kind and failpoint."""
    table = Table()
    for heading in ("fault", "where", "times"):
        table.add_column(heading, justify="right" if heading == "times" else "left")
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for text in fired:
        fault = parse_fault(text)
        counts[fault.kind, fault.failpoint] += 1
    for (kind, failpoint), times in sorted(counts.items()):
        table.add_row(kind, failpoint, str(times))
    return table


def summarize(attempts: list[dict[str, Any]]) -> str:
    """The cost of the restarts, in one line."""
    restarts = [attempt for attempt in attempts if attempt["cause"]]
    if not restarts:
        return "none"
    seconds = {name: mean(attempt["seconds"][name] for attempt in restarts) for name in restarts[0]["seconds"]}
    lost = [attempt["lost_steps"] for attempt in restarts]
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in seconds.items())
    return f"{shown}; steps lost {mean(lost):.1f}, at most {max(lost)}"


def _train(arguments: list[str], ranks: int) -> str:
    """Train to the end, restarting after every fault. Returns the digest of the weights."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(_RESTARTS), "--monitor-interval"]
    command = tied([sys.executable, *torchrun, "0.05", "--nproc-per-node", str(ranks), "-m", "distrain", *arguments])
    last = ""
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **RELIABLE_RESTARTS}
        ) as training:
            assert training.stdout is not None
            for line in training.stdout:
                print(line, end="", flush=True)
                if line.startswith("done: "):
                    last = line.strip()
        if training.returncode or not last:
            errors.seek(0)
            print(errors.read()[-3000:], file=sys.stderr)
            raise UserError("soak: training did not finish; see its last errors above")
    return last.rpartition("weights ")[2]
