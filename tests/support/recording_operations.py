"""Runs distrain and records how this rank saves, in the words of commit_model.py: a line for each operation, in a file
that OPERATIONS names, with the rank appended."""

import os
import re
import sys
import threading
from pathlib import Path

import torch.distributed as dist

from distrain import cli

record = Path(f"{os.environ['OPERATIONS']}-{os.environ['RANK']}").open("w")  # noqa: SIM115, until the process ends
_NAMES = (
    (r"checkpoints/step-\d+\.\w+\.tmp/__\d_\d\.distcp$", "data"),
    (r"checkpoints/step-\d+\.\w+\.tmp/\.metadata(\.\w+)*(\.tmp)?$", "metadata"),
    (r"checkpoints/step-\d+\.\w+\.tmp/manifest\.json(\.\w+)*(\.tmp)?$", "manifest"),
    (r"checkpoints/step-\d+\.removed\.tmp$", "removed"),
    (r"checkpoints/step-\d+\.\w+\.tmp$", "draft"),
    (r"checkpoints/step-\d+$", "final"),
    (r"checkpoints$", "checkpoints"),
)


def name_of(path: object) -> str:
    """What a path is in the model, "" if it is not in it."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return next((name for pattern, name in _NAMES if re.search(pattern, text)), "")


def write(operation: str) -> None:
    if threading.current_thread().name.startswith("checkpoint"):
        record.write(f"{operation}\n")
        record.flush()


def audit(event, arguments) -> None:
    if event == "open":
        path, mode, flags = arguments
        writes = "w" in mode if mode else flags & os.O_WRONLY
        if writes and name_of(path):
            write(f"write {name_of(path)}")
    elif event == "os.rename":
        old, new = name_of(arguments[0]), name_of(arguments[1])
        if new:
            write(f"rename {new}" if old == new else f"rename {old} to {new}")
    elif event == "shutil.rmtree" and name_of(arguments[0]) == "removed":
        write("remove")
    elif event == "os.listdir" and str(arguments[0]).endswith("/attempts"):
        write("check attempts")


def recorded_fsync(file) -> None:
    if name := name_of(os.readlink(f"/proc/self/fd/{file}")):  # noqa: PTH115, the file may be gone
        write(f"flush {name}")
    fsync(file)


def recorded_exchange(*arguments, **options) -> None:
    write("agree")
    exchange(*arguments, **options)


fsync, os.fsync = os.fsync, recorded_fsync  # type: ignore[assignment]
exchange, dist.all_gather_object = dist.all_gather_object, recorded_exchange
sys.addaudithook(audit)
sys.exit(cli.run(sys.argv[1:]))
