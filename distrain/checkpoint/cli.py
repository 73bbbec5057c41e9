"""`python -m distrain checkpoints`: list, verify, show and prune the checkpoints of a run."""

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from distrain.checkpoint.distribution import read_into_memory
from distrain.checkpoint.files import (
    choose_kept,
    committed,
    read,
    read_best,
    remove,
    set_aside,
    set_aside_names,
    step_of,
    tensors_in,
    verify,
    weights_digest,
)
from distrain.checkpoint.metadata import DamagedCheckpointError
from distrain.errors import EXIT_DONE, EXIT_USER, UserError, printable
from distrain.files import read_regular, translated_errors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List, verify, show and prune the checkpoints of a run. RUN is its folder, runs/NAME."
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=summary, description=summary.capitalize() + "."
        )
        command.add_argument("run_folder", type=Path, metavar="RUN", help="folder of the run")
        command.set_defaults(run=run)
        return command

    add("list", _list, "list checkpoints with step, size and time, and those set aside as damaged")
    verified = add("verify", _verify, "compare every file with its checksum; exit 78 if one differs")
    verified.add_argument("--set-aside", action="store_true", help="rename damaged ones, so that no run loads them")
    shown = add("show", _show, "show the contents of one checkpoint and the digest of its weights")
    shown.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    pruned = add("prune", _prune, "remove all checkpoints but the newest, the best, and multiples of N steps")
    pruned.add_argument("--keep", type=int, required=True, metavar="N", help="newest checkpoints to keep, at least 1")
    pruned.add_argument(
        "--keep-every-steps",
        type=int,
        default=0,
        metavar="N",
        help="also keep multiples of N steps",
    )
    pruned.add_argument("--dry-run", action="store_true", help="only print what would be removed")


def _list(args: argparse.Namespace) -> int:
    found = _find(args.run_folder)
    best = read_best(args.run_folder / "checkpoints")
    table = Table(box=None)
    for heading in ("step", "size", "written", ""):
        table.add_column(heading, justify="left" if heading in ("written", "") else "right")
    for path in found:
        size = sum(file.lstat().st_size for file in path.iterdir()) if path.is_dir() else 0
        note = f"best, top-1 {best[1]:.2%}" if best is not None and best[0] == step_of(path) else ""
        table.add_row(f"{step_of(path):,}", f"{decimal(size)}", _local_time(path.lstat().st_mtime), note)
    Console(soft_wrap=True).print(table)
    for name in set_aside_names(found[-1].parent):
        try:
            reason = read_regular(found[-1].with_name(name) / "reason.txt").decode(errors="replace").strip()
        except OSError:
            reason = "no reason recorded"
        print(printable(f"set aside: {name}: {reason}"))
    return EXIT_DONE


def _verify(args: argparse.Namespace) -> int:
    damaged = 0
    for path in _find(args.run_folder):
        try:
            os.close(read_into_memory(path))  # as a start does
            print(f"{path.name}: intact", flush=True)
        except DamagedCheckpointError as error:
            damaged += 1
            aside = f"; set aside as {set_aside(path, str(error)).name}" if args.set_aside else ""
            print(printable(f"{path.name}: damaged: {error}{aside}"), flush=True)
    return EXIT_USER if damaged else EXIT_DONE


def _show(args: argparse.Namespace) -> int:
    found = {step_of(path): path for path in _find(args.run_folder)}
    step = max(found) if args.step is None else args.step
    if step not in found:
        raise UserError(f"{args.run_folder}: no checkpoint of step {step}; found {', '.join(map(str, found))}")
    try:
        manifest = verify(found[step])
    except DamagedCheckpointError as error:
        raise UserError(f"{found[step]}: damaged: {error}") from error
    groups: dict[str, list[int]] = defaultdict(list)
    for name, entry in tensors_in(found[step]).items():
        kind, _, rest = name.partition("/")
        size = torch.Size(entry.size).numel() * entry.properties.dtype.itemsize
        groups[f"{kind} {rest.rpartition('/')[2]}" if kind == "optimizer" else kind].append(size)
    print(f"{found[step]}: step {step}")
    for group, sizes in groups.items():
        print(f"  {group}: {len(sizes):,} tensors, {decimal(sum(sizes))}")
    print(f"  weights {weights_digest(read(found[step]).tensors)}")
    for section in ("versions", "identity"):
        print(f"  {section}")
        for key, value in sorted(manifest.get(section, {}).items()):
            print(f"    {key}: {json.dumps(value)}")
    return EXIT_DONE


def _prune(args: argparse.Namespace) -> int:
    if args.keep < 1 or args.keep_every_steps < 0:
        raise UserError("--keep must be at least 1, and --keep-every-steps at least 0")
    found = {step_of(path): path for path in _find(args.run_folder)}
    best = read_best(args.run_folder / "checkpoints")
    kept = choose_kept(found.keys(), args.keep, args.keep_every_steps, best and best[0])
    newest = found[max(found)]
    try:
        verify(newest)
    except DamagedCheckpointError as error:
        raise UserError(f"{newest}: damaged: {error}; nothing removed: an older one may be needed") from error
    for step in sorted(found.keys() - kept):
        if not args.dry_run:
            remove(found[step])
        print(f"{'would remove' if args.dry_run else 'removed'} {found[step].name}")
    return EXIT_DONE


def _find(run_folder: Path) -> list[Path]:
    folder = run_folder / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run_folder}: not the folder of a run; give runs/NAME, which contains checkpoints/")
    with translated_errors(folder):
        found = committed(folder)
    if not found:
        raise UserError(f"{folder}: no checkpoints found")
    return found


def _local_time(seconds: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
