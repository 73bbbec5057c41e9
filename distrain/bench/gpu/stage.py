"""The stages, and one of them in a process of its own: `python -m distrain.bench.gpu.stage NAME FILE [--rehearse]
[key=value ...]` writes its Record to FILE."""

import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from distrain.arguments import AnyOrder
from distrain.lifetime import end_with_agent


@dataclass(frozen=True)
class Stage:
    """A measurement in a process of its own."""

    what: str
    limit_s: float
    """It is killed after so many seconds."""
    function: str
    """MODULE:NAME in this package, imported by the process of the stage only."""
    needs: tuple[str, ...] = ()
    """Modules beyond those of training; without one of them the stage is not measured."""


_SHARDS = ("PIL", "pyarrow", "fsspec", "webdataset", "braceexpand")

STAGES = {
    "versions": Stage(
        "GPU, driver, libraries; rates of copies; what deterministic mode needs", 20, "machine:measure_versions"
    ),
    "resume": Stage(
        "train on JPEG files, SIGTERM, resume; equal to an uninterrupted run",
        60,
        "training:measure_resume",
        needs=(*_SHARDS, "matplotlib"),
    ),
    "waits": Stage("calls in which a step waits for the GPU, by line, for every strategy", 30, "steps:measure_waits"),
    "memory": Stage("training fits itself to a GPU with too little memory", 40, "steps:measure_memory"),
    "speed": Stage("images/s and memory in variants, beside torchvision and timm", 135, "steps:measure_speed"),
    "profile": Stage("launches per step, busy share, longest kernels", 35, "profile:measure_profile"),
    "recompute": Stage(
        "images/s and memory of train.recompute=none, selective, full", 35, "steps:measure_recomputation"
    ),
    "decode": Stage("a step beside threads that decode", 40, "host:measure_decode", needs=_SHARDS),
    "checkpoint": Stage("how long saving a checkpoint stalls training", 35, "host:measure_checkpoint"),
    "digests": Stage("two trainings end with the same weights", 40, "training:measure_digests"),
    "tests": Stage("pytest -m gpu, without DALI", 60, "machine:run_tests", needs=("pytest", "hypothesis", *_SHARDS)),
}
"""By name, in the order in which they run."""


def main(argv: list[str]) -> int:
    """Run a stage and return the exit code: 1 if anything in it has failed."""
    parser = AnyOrder()
    parser.add_argument("name", choices=STAGES)
    parser.add_argument("file", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)

    from distrain.bench.gpu.setup import FULL, REHEARSAL, Record, Setup

    record = Record(args.file)
    with TemporaryDirectory(prefix="distrain-gpu-") as folder, record.attempt(args.name):
        setup = Setup(REHEARSAL if args.rehearse else FULL, args.overrides, Path(folder), record)
        stage = STAGES[args.name]
        if missing := [name for name in stage.needs if find_spec(name) is None]:
            record.skip(args.name, f"{', '.join(missing)} not installed")
            return 0
        module, function = stage.function.split(":")
        getattr(importlib.import_module(f"distrain.bench.gpu.{module}"), function)(setup)
    return 1 if record.errors else 0


if __name__ == "__main__":
    end_with_agent()
    sys.exit(main(sys.argv[1:]))
