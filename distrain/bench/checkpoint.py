"""`python -m distrain bench checkpoint`: the overhead of checkpointing."""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from distrain import config
from distrain.arguments import add_run_arguments, check_writable
from distrain.bench.rounds import synchronize
from distrain.bench.step import distrain_candidate
from distrain.bench.step_cli import UNUSED_SETTINGS
from distrain.checkpoint import Checkpointer
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError
from distrain.learner import Learner, build_network
from distrain.parallel.group import Group

ROWS = {
    "step": "step without a checkpoint",
    "stall": "stall: copying the state",
    "step_during_write": "step during the write",
    "commit": "save to commit",
}


def add_command(commands: Any) -> None:
    """Add `checkpoint` to the commands of `bench`."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="measure the overhead of checkpointing",
        description="Train on synthetic images in one process, save a checkpoint in every round, and compare the "
        "time that training stalls with the duration of a step.",
    )
    add_run_arguments(checkpoint)
    checkpoint.add_argument("--rounds", type=int, default=5, metavar="N", help="checkpoints to save (default 5)")
    checkpoint.add_argument("--folder", type=Path, metavar="DIR", help="parent of the temporary output folder")
    checkpoint.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    checkpoint.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and return the exit code. Raises UserError for invalid arguments."""
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    if args.json:
        check_writable(args.json)
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: directory not found")
    settings = config.load(args.config, [*UNUSED_SETTINGS, *args.overrides])
    console = Console()
    with console.status("measuring"), TemporaryDirectory(dir=args.folder) as folder, Group() as group:
        size, measured = measure(settings, Path(folder), args.rounds, group)
    seconds = {name: values[1:] for name, values in measured.items()}
    console.print(tabulate(f"{settings.model.name}, {decimal(size)} of state", seconds))
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "seconds": seconds}, indent=1) + "\n")
    return EXIT_DONE


def measure(settings: Config, folder: Path, rounds: int, group: Group) -> tuple[int, dict[str, list[float]]]:
    """Return the bytes of the state and, for each of ROWS, the seconds of a warm-up round, whose stall includes the
    allocation of host memory, and of `rounds` further ones."""
    learner = Learner(settings, group, build_network(settings, group.device), None, lambda line: None)
    step = distrain_candidate(learner, group.device)
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}

    def save(number: int) -> None:
        checkpoints.save(number, learner.state(), dict)

    with closing(Checkpointer(folder, group, settings.checkpoint)) as checkpoints:
        for number in range(rounds + 1):
            step()  # touches all weights, so that every round starts with the same cache
            seconds["step"].append(timed(step, group.device))
            start = time.perf_counter()
            seconds["stall"].append(timed(partial(save, number + 1), group.device))
            checkpoints.start_write()
            seconds["step_during_write"].append(timed(step, group.device))
            if not checkpoints.wait():
                raise UserError(f"{folder}: saving a checkpoint failed")
            seconds["commit"].append(time.perf_counter() - start)
    size = sum(tensor.nbytes for tensor in learner.state().values())
    return size, seconds


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes, including what it leaves on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def tabulate(title: str, seconds: dict[str, list[float]]) -> Table:
    """Return a table with a row for each of ROWS."""
    table = Table(title=f"{title}, {len(seconds['step'])} rounds")
    for heading in ("", "seconds, median (range)", "vs step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in ROWS.items():
        values = seconds[name]
        ratios = [value / step for value, step in zip(values, seconds["step"], strict=True)]
        table.add_row(label, f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})", f"{median(ratios):.3f}")
    return table
