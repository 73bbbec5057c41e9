"""`python -m distrain soak`: a run under random faults, compared to the last bit with one that nothing happened to."""

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
from distrain.data.loading.feed import load_indexes, make_plan
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.parallel.group import RELIABLE_RESTARTS
from distrain.resilience.faults import Fault, parse_fault

# What may happen to a run whose numbers must not change. Each is followed by a restart, the last ones by way of a kill.
_RANDOM = {
    "step": ("sigkill", "sigstop", "exception", "oom", "exit", "sigterm", "hang"),
    "load": ("hang", "exception"),
    "evaluate": ("sigkill", "sigstop", "exception", "hang", "exit", "sigterm"),
    "stage": ("sigkill", "exception", "exit"),
    "write": ("sigkill", "exit", "ioerror", "diskfull", "sigterm"),
    "manifest": ("sigkill", "exit", "ioerror"),
    "rename": ("sigkill", "exit"),
    "commit": ("sigkill", "flip", "truncate"),
}
_LEADERS = ("manifest", "rename")  # places where only rank 0 ever is
_RESTARTS = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train as configured under random faults until done: kills, freezes, hangs, exceptions, full disks, damaged "
        "checkpoints, in every phase and rank. Then compare with an undisturbed run of the same configuration. "
        "What was interrupted goes on when the same command is given again."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--faults", type=int, default=25, metavar="N", help="how many (default 25)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other faults at other steps (default 0)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes, or GPUs (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    settings = config.load(args.config, args.overrides)
    config.check_ranks(settings, args.ranks)
    if args.faults < 1:
        raise UserError("--faults must be at least 1")
    steps = make_plan(settings, load_indexes(settings)[0]).steps
    if steps < 2 * args.faults:
        raise UserError(
            f"a run of {steps} steps is too short for {args.faults} faults: set train.epochs so that it has at least "
            f"{2 * args.faults}"
        )
    faults = draw_faults(args.seed, args.faults, steps, args.ranks)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(f"{steps:,} steps on {args.ranks} ranks without a fault, and then with {args.faults}")
    base = [*(["--config", args.config] if args.config else []), *args.overrides]
    name = f"{settings.run.name}-soak"
    digests = {
        "undisturbed": _train([*base, f"run.name={name}-undisturbed"], args.ranks),
        "soaked": _train(
            [
                *base, f"run.name={name}", "resilience.attempts=0",
                f"resilience.faults=[{','.join(map(str, faults))}]",
            ],
            args.ranks,
        ),
    }  # fmt: skip
    folder = Path(settings.run.dir) / name
    struck = [json.loads(line)["fault"] for line in (folder / "faults.jsonl").read_text().splitlines()]
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    console.print(tabulate(struck))
    console.print(f"seconds, means over all restarts: {sum_up(attempts)}")
    same = digests["undisturbed"] == digests["soaked"]
    verdict = "the same bits" if same else "OTHER BITS"
    console.print(
        f"{len(struck)} faults struck, {len(attempts)} attempts: {verdict}, "
        f"{digests['soaked']} and undisturbed {digests['uninterrupted']}"
    )
    if args.json:
        args.json.write_text(json.dumps({"struck": struck, "attempts": attempts, "digests": digests}, indent=1) + "\n")
    return EXIT_DONE if same else EXIT_USER


def draw_faults(seed: int, count: int, steps: int, ranks: int) -> list[Fault]:
    """So many random faults, spread over the run, in order of their steps. A damaged checkpoint is followed by a kill,
    for only then is it read."""
    draw = random.Random(seed)
    faults: list[Fault] = []
    for number in range(count):
        first, last = number * steps // count, (number + 1) * steps // count - 1
        place = draw.choice(list(_RANDOM))
        kind = draw.choice(_RANDOM[place])
        rank = 0 if place in _LEADERS or kind in ("flip", "truncate") else draw.randrange(ranks)
        faults.append(Fault(kind, place, draw.randint(first, last), rank))
    return faults


def tabulate(struck: list[str]) -> Table:
    """A row per kind and place of fault."""
    table = Table()
    for heading in ("fault", "where", "times"):
        table.add_column(heading, justify="right" if heading == "times" else "left")
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for text in struck:
        fault = parse_fault(text)
        counts[fault.kind, fault.place] += 1
    for (kind, place), times in sorted(counts.items()):
        table.add_row(kind, place, str(times))
    return table


def sum_up(attempts: list[dict[str, Any]]) -> str:
    """What the restarts cost."""
    restarts = [attempt for attempt in attempts if attempt["cause"]]
    if not restarts:
        return "none"
    parts = {name: mean(attempt["seconds"][name] for attempt in restarts) for name in restarts[0]["seconds"]}
    lost = [attempt["lost_steps"] for attempt in restarts]
    shown = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in parts.items())
    return f"{shown}; steps lost {mean(lost):.1f}, at most {max(lost)}"


def _train(arguments: list[str], ranks: int) -> str:
    """Train to the end, starting again as often as it takes. Returns the digest of the weights."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(_RESTARTS), "--monitor-interval"]
    command = [sys.executable, *torchrun, "0.05", "--nproc-per-node", str(ranks), "-m", "distrain", *arguments]
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
            raise UserError("soak: training did not come to its end; its last errors stand above")
    return last.rpartition("weights ")[2]
