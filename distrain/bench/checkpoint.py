"""`python -m distrain bench checkpoint`: what saving the state costs the training."""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from distrain import config
from distrain.arguments import check_writable
from distrain.bench.step import loop_of_ours
from distrain.bench.step_cli import NEEDED
from distrain.checkpoint import Checkpointer
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError
from distrain.learner import Learner
from distrain.parallel.group import Group

ROWS = {
    "step": "a step, alone",
    "stall": "the stall: copying the state",
    "beside": "a step while it is written",
    "written": "until it is whole on disk",
}


def configure(commands: Any) -> None:
    checkpoint = commands.add_parser(
        "checkpoint",
        help="what saving the state costs the training",
        description="Train on made-up images in one process, save the state again and again, and tell how long that "
        "holds up training, next to the length of a step.",
    )
    checkpoint.add_argument("--config", metavar="FILE", help="YAML file of a run")
    checkpoint.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    checkpoint.add_argument("--rounds", type=int, default=5, metavar="N", help="checkpoints to save (default 5)")
    checkpoint.add_argument("--folder", type=Path, metavar="DIR", help="where to write them (default: a temporary one)")
    checkpoint.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    checkpoint.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    if args.json:
        check_writable(args.json)
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder}: no such folder")
    settings = config.load(args.config, [*NEEDED, *args.overrides])
    console = Console()
    with console.status("measuring"), TemporaryDirectory(dir=args.folder) as folder, Group() as group:
        size, seconds = measure(settings, Path(folder), args.rounds, group)
    console.print(tabulate(f"{settings.model.name}, {size / 1e6:,.0f} MB of state", seconds))
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "seconds": seconds}, indent=1) + "\n")
    return EXIT_DONE


def measure(settings: Config, folder: Path, rounds: int, group: Group) -> tuple[int, dict[str, list[float]]]:
    """The bytes of the state, and for each of ROWS the seconds of every round after a first one that is not counted."""
    learner = Learner(settings, group, None, lambda line: None)
    step = loop_of_ours(learner, group.device)
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    with closing(Checkpointer(folder, group, settings.checkpoint)) as checkpoints:
        for number in range(rounds + 1):
            step()  # touches all weights, so that none is in the cache by chance
            seconds["step"].append(timed(step))
            began = time.perf_counter()
            checkpoints.save(number + 1, learner.state(), {})
            seconds["stall"].append(time.perf_counter() - began)
            seconds["beside"].append(timed(step))
            if not checkpoints.wait():
                raise UserError(f"{folder}: a checkpoint could not be written there")
            seconds["written"].append(time.perf_counter() - began)
    size = sum(tensor.nbytes for tensor in learner.state().values())
    return size, {name: values[1:] for name, values in seconds.items()}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tabulate(title: str, seconds: dict[str, list[float]]) -> Table:
    """A row for each of ROWS."""
    table = Table(title=f"{title}, {len(seconds['step'])} rounds")
    for heading in ("", "seconds, median (range)", "of a step"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, meaning in ROWS.items():
        values = seconds[name]
        shares = [value / step for value, step in zip(values, seconds["step"], strict=True)]
        table.add_row(meaning, f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})", f"{median(shares):.3f}")
    return table
