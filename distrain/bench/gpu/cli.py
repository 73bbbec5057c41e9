"""`python -m distrain bench gpu`: run the stages one after the other, keep what each has found, print a table."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distrain import config
from distrain.arguments import check_writable
from distrain.bench.gpu.stage import STAGES, Stage
from distrain.bench.step_cli import UNUSED_SETTINGS
from distrain.errors import EXIT_DONE, UserError, nearest
from distrain.lifetime import tied

EXIT_FAILED = 1
_ERROR_LINES = 5
_REHEARSAL_LIMIT = 20  # times that of a stage: a CPU is slow, and what a rehearsal shows is not the time

_DESCRIPTION = """\
Measure on one NVIDIA GPU what only a GPU can show: correctness, speed beside torchvision and timm, memory,
waits. Each stage is a process of its own that is killed at its limit; a stage that fails or is killed does
not stop the others. Its results are appended to FILE, one line of JSON per stage, as soon as it ends, so
that a machine that is lost keeps what was measured. All stages together take at most nine minutes.

stages, and the seconds after which each is killed:
{stages}

It needs Python 3.11, an NVIDIA driver, and these packages:
  all stages        torch, torchvision, omegaconf, pyyaml, numpy, rich, psutil
  resume, decode    also pillow, pyarrow, fsspec, webdataset, braceexpand; resume also matplotlib
  speed, profile    also timm, or only torchvision is compared with
  waits             also deepspeed, or only ddp is measured
  tests             also pytest, hypothesis, those of decode, and the folder tests/
A stage without its packages is not measured. NVIDIA DALI, MLflow and all else may be absent.

What this machine cannot measure is reported as such and not as an error. Without a GPU the stages run on the
CPU, where sizes for a GPU take longer than the limits: add --rehearse, which runs every stage on toy sizes to
find out whether it works at all. Its numbers mean nothing."""

_EPILOG = """\
A line of FILE is an object: stage, ok, started, seconds, limit_s, rehearsal, device, overrides; results, what
was measured, by name; summary, the same in lines of text; not_measured, errors and messages, what distrain
has chosen for the device, lists of lines.
Rates are medians of rounds in which the candidates alternate; ratios are medians of ratios within a round.

examples:
  python -m distrain bench gpu --rehearse                    does it work here? (minutes, no GPU needed)
  python -m distrain bench gpu --out gpu.jsonl               everything
  python -m distrain bench gpu --stages speed,profile train.compile=true

exit codes: 0 everything was measured; 1 a stage has failed or was killed, see the table; 78 a wrong argument
"""


def add_command(commands: Any) -> None:
    """Add `gpu` to the commands of `bench`."""
    gpu = commands.add_parser(
        "gpu",
        help="measure everything that needs a GPU, in at most nine minutes",
        description=_DESCRIPTION.format(stages=_listed()),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change in all stages")
    gpu.add_argument(
        "--out",
        type=Path,
        default=Path("bench-gpu.jsonl"),
        metavar="FILE",
        help="append to FILE (default: %(default)s)",
    )
    gpu.add_argument("--stages", metavar="NAME,...", help="run only these stages (default: all)")
    gpu.add_argument("--list", action="store_true", help="list the stages and their limits, and exit")
    gpu.add_argument("--rehearse", action="store_true", help="toy sizes: check that every stage works")
    gpu.add_argument("--device", choices=["cuda", "cpu"], help="where to run (default: cuda if there is a GPU)")
    gpu.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the stages, print a table and return the exit code. Raises UserError for invalid arguments."""
    if args.list:
        print(_listed())
        return EXIT_DONE
    names = select(args.stages)
    config.load(None, [*UNUSED_SETTINGS, "model.name=any", *args.overrides])  # raises UserError for a wrong one
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU on this machine: leave it out, or name cpu")
    check_writable(args.out, "--out")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if device == "cpu" and not args.rehearse:
        console.print("without a GPU most stages are killed at their limits: add --rehearse")
    words = [*(["--rehearse"] if args.rehearse else []), *args.overrides]
    outcomes = []
    with TemporaryDirectory(prefix="distrain-gpu-") as folder:
        for name in names:
            with console.status(f"measuring {name}"):
                outcome = run_stage(name, STAGES[name], device, words, Path(folder))
            with args.out.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
            outcomes.append(outcome)
            console.print(f"{name}: {'done' if outcome['ok'] else 'FAILED'} in {outcome['seconds']:.0f} s")
    console.print(tabulate(outcomes))
    return EXIT_DONE if all(outcome["ok"] for outcome in outcomes) else EXIT_FAILED


def select(stages: str | None) -> list[str]:
    """The stages in a comma-separated list, in the order in which they run. Raises UserError for an unknown one."""
    chosen = list(STAGES) if stages is None else stages.split(",")
    for name in chosen:
        if name not in STAGES:
            raise UserError(f"--stages {name} is not known: {nearest(name, STAGES)}")
    return [name for name in STAGES if name in chosen]


def run_stage(name: str, stage: Stage, device: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run a stage in a process group of its own. Returns its line of the results, with what it had found by then if it
    was killed."""
    limit = stage.limit_s * (_REHEARSAL_LIMIT if "--rehearse" in words else 1)
    record, log = folder / f"{name}.json", folder / f"{name}.log"
    command = tied(command_of(name, record, words))
    variables = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # also what it has started and left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(record.read_text()) if record.exists() else {}
    errors = found.get("errors", [])
    if code is None:
        errors = [*errors, f"killed after {limit:g} s; its last output: {' | '.join(_tail(log))}"]
    elif code and not errors:
        errors = [f"exited with code {code}: {' | '.join(_tail(log))}"]
    return {
        "stage": name,
        "ok": not errors,
        "started": started,
        "seconds": round(time.monotonic() - began, 1),
        "limit_s": limit,
        "rehearsal": "--rehearse" in words,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "overrides": [word for word in words if "=" in word],
        "results": found.get("results", {}),
        **{key: found.get(key, []) for key in ("summary", "not_measured", "messages")},
        "errors": errors,
    }


def command_of(name: str, record: Path, words: Sequence[str]) -> list[str]:
    """The words that run a stage, which writes its Record to the file `record`."""
    return [sys.executable, "-m", "distrain.bench.gpu.stage", name, str(record), *words]


def tabulate(outcomes: Iterable[dict[str, Any]]) -> Table:
    """A table with a row per stage: how it ended, what it found, what it could not measure, what went wrong."""
    outcomes = list(outcomes)
    rehearsal = ", a rehearsal on toy sizes: its numbers mean nothing" if outcomes[0]["rehearsal"] else ""
    table = Table(title=f"{outcomes[0]['device']}{rehearsal}", show_lines=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("result")
    for outcome in outcomes:
        lines = [escape(line) for line in [*outcome["summary"], *outcome["not_measured"]]]
        lines += [f"[red]FAILED: {escape(line)}[/red]" for line in outcome["errors"]]
        table.add_row(outcome["stage"], f"{outcome['seconds']:.0f}", "\n".join(lines))
    return table


def _listed() -> str:
    return "\n".join(f"  {name:<11} {stage.limit_s:4g}  {stage.what}" for name, stage in STAGES.items())


def _tail(log: Path) -> list[str]:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:300] for line in lines[-_ERROR_LINES:]]
