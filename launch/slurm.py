"""`launch slurm`: generate a batch script for a configuration and submit it."""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from distrain import config
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError
from distrain.masking import mask_secrets

_BATCH = Path("launch") / "batch.sh"
_OPTION = re.compile(r"[A-Za-z0-9.,:+@/_-]+")  # not what Slurm or a shell reads as more than a value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", metavar="N", help="number of nodes, or MIN-MAX (default: one lane per GPU)")
    parser.add_argument("--gpus", type=int, default=8, metavar="M", help="GPUs per node (default 8)")
    parser.add_argument("--partition", metavar="NAME", help="partition (default: the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="account to charge (default: yours)")
    parser.add_argument(
        "--time", default="24:00:00", metavar="LIMIT", help="time limit, at which it is requeued (default 24:00:00)"
    )
    parser.add_argument("--image", metavar="IMAGE", help="container image: a .sif file for Apptainer, else for Pyxis")
    parser.add_argument("--dry-run", action="store_true", help="print the script, do not submit it")


def run(args: argparse.Namespace) -> int:
    if not args.config:
        raise UserError("nothing to train: give --config FILE")
    settings = config.load(args.config, args.overrides)
    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    for name in ("nodes", "partition", "account", "time"):
        value = getattr(args, name)
        if value is not None and not _OPTION.fullmatch(value):
            raise UserError(f"--{name} {value!r} may have letters, digits and .,:+@/_- only")
    for value in (args.image or "", args.config):
        if not value.isprintable():
            raise UserError(f"{value!r} contains a line break or another control character: remove it")
    for override in args.overrides:
        if mask_secrets(override) != override:
            raise UserError(
                f"{override} would stand in the script, with its secret: set it in the environment instead, which "
                "sbatch passes on, as MLFLOW_TRACKING_URI or with ${oc.env:NAME} in the value"
            )
    script = render(args, settings)
    if args.dry_run:
        print(script, end="")
        return EXIT_DONE
    if shutil.which("sbatch") is None:
        raise UserError("sbatch not found: run this on a login node, or print the script with --dry-run")
    done = subprocess.run(["sbatch"], input=script, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split())}")
    job = (done.stdout.split() or ["?"])[-1]
    print(f"submitted job {job} to train {settings.run.folder}: tail -f {job_name(settings)}-{job}.log")
    return EXIT_DONE


def job_name(settings: Config) -> str:
    """The run's name as Slurm's options can hold it."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", settings.run.name)


def render(args: argparse.Namespace, settings: Config) -> str:
    """A batch script like those in slurm/."""
    nodes = args.nodes or str(-(-settings.batch.lanes // args.gpus))
    options = {
        "job-name": job_name(settings),
        "nodes": nodes,
        "gpus-per-node": args.gpus,
        "ntasks-per-node": 1,
        "exclusive": None,
        "mem": 0,
        "partition": args.partition,
        "account": args.account,
        "time": args.time,
        "signal": "USR1@180",
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    flags = ("exclusive", "requeue")
    lines = ["#!/usr/bin/env bash"]
    for name, value in options.items():
        if value is not None:
            lines.append(f"#SBATCH --{name}={value}")
        elif name in flags:
            lines.append(f"#SBATCH --{name}")
    lines += ["", f"RUN={shlex.quote(str(settings.run.folder))}"]
    if args.image:
        lines.append(f"CONTAINER={shlex.quote(args.image)}")
    if args.overrides:
        lines.append(f"overrides=({shlex.join(args.overrides)})")
    lines.append(f"CONFIG={shlex.quote(args.config)}")
    if _BATCH.is_file():  # submitted from a checkout
        lines.append(f'. "$SLURM_SUBMIT_DIR/{_BATCH}"')
    else:
        if not args.image:
            lines.append(f'[ -n "${{PYTHON:-}}" ] || PYTHON={shlex.quote(sys.executable)}')
        lines.append(f". {shlex.quote(str(Path(__file__).with_name(_BATCH.name)))}")
    return "\n".join(lines) + "\n"
