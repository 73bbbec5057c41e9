"""`python -m launch slurm`: a batch script made from a configuration, and submitted."""

import argparse
import shlex
import shutil
import subprocess
from pathlib import Path

from distrain import config
from distrain.config import Config
from distrain.errors import EXIT_DONE, UserError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", metavar="N", help="how many, or MIN-MAX (default: as many as the lanes ask for)")
    parser.add_argument("--gpus", type=int, default=8, metavar="M", help="on each node (default 8)")
    parser.add_argument("--partition", metavar="NAME", help="where to queue (default: the cluster's)")
    parser.add_argument("--account", metavar="NAME", help="whom to bill (default: yours)")
    parser.add_argument("--time", default="24:00:00", metavar="LIMIT", help="after which it is requeued (24:00:00)")
    parser.add_argument("--image", metavar="IMAGE", help="container: a .sif file for Apptainer, or else for Pyxis")
    parser.add_argument("--dry-run", action="store_true", help="print the script and do not submit it")


def run(args: argparse.Namespace) -> int:
    if not args.config:
        raise UserError("nothing to train: give --config FILE")
    settings = config.load(args.config, args.overrides)
    if args.gpus < 1:
        raise UserError("--gpus must be at least 1")
    script = render(args, settings)
    if args.dry_run:
        print(script, end="")
        return EXIT_DONE
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here: run this where jobs are submitted, or see the script with --dry-run")
    if not Path("launch/batch.sh").is_file():
        raise UserError("run this in the checkout: the job needs launch/batch.sh in the folder it is submitted from")
    done = subprocess.run(["sbatch"], input=script, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"sbatch: {done.stderr.strip()}")
    job = done.stdout.split()[-1]
    print(f"job {job} will train {settings.run.folder}: tail -f {settings.run.name}-{job}.log")
    return EXIT_DONE


def render(args: argparse.Namespace, settings: Config) -> str:
    """A script like those in slurm/. A sbatch that reads it from its standard input gives it the folder it is in."""
    nodes = args.nodes or str(-(-settings.batch.lanes // args.gpus))
    options = {
        "job-name": settings.run.name,
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
    lines += [f"CONFIG={shlex.quote(args.config)}", '. "$SLURM_SUBMIT_DIR/launch/batch.sh"']
    return "\n".join(lines) + "\n"
