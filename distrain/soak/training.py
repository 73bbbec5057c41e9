"""The training of a soak, restarted after every fault."""

import os
import subprocess
import sys
from tempfile import TemporaryFile

from distrain.errors import UserError
from distrain.lifetime import tied
from distrain.parallel.group import RELIABLE_RESTARTS

_RESTARTS = 1000


def train(arguments: list[str], ranks: int) -> str:
    """Train to the end, restarting after every fault. Returns the digest of the weights."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(_RESTARTS), "--monitor-interval"]
    command = tied([sys.executable, *torchrun, "0.05", "--nproc-per-node", str(ranks), "-m", "distrain", *arguments])
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
            raise UserError("soak: training did not finish; see its last errors above")
    return last.rpartition("weights ")[2]
