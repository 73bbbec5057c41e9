"""Starts waits_main.py: where a host waits for its device."""

import json
import subprocess
import sys
from pathlib import Path

from support.processes import environment

PROGRAM = Path(__file__).parents[1] / "support" / "waits_main.py"
# What reads numbers that are in host memory: outcomes of the step before, flags sent over gloo, and, for the stages of
# ZeRO in which DeepSpeed tells by itself whether it took a step, the loss scale.
READS_OF_THE_HOST = {
    ("distrain.outcomes", "read"),
    ("distrain.parallel.group", "wait"),
    ("distrain.parallel.zero", "backward"),
}


def count_waits(folder: Path, *settings: str) -> dict[tuple[str, str], int]:
    """How often the host would wait for a GPU, by module and function, in four steps of which one saves."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *settings, f"run.dir={folder}", "run.name=run"],
        capture_output=True, text=True, env=environment(), timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {(module, function): times for module, function, times in json.loads(done.stdout.splitlines()[-1])}
