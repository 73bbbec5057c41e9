"""A Slurm cluster of several nodes on this machine, each in namespaces of its own; see minicluster.sh."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("minicluster.sh")
REPOSITORY = Path(__file__).parents[2]
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")


def why_not() -> str | None:
    """What this machine lacks to play a cluster, if anything."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    return f"needs {', '.join(missing)} (see the top of {SCRIPT.name})" if missing else None


class Cluster:
    """Nodes n1, n2, ... and a head. A context manager that starts them and leaves nothing behind."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # a short path: it holds sockets

    def __enter__(self) -> "Cluster":
        self._call("up", str(len(self.nodes)))
        return self

    def __exit__(self, *error: object) -> None:
        self._call("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def head(self, *words: str, **variables: str) -> str:
        """Run a command where users log in; return what it printed."""
        return self._call("exec", *words, **variables)

    def on(self, node: str, *words: str) -> str:
        return self._call("on", node, *words)

    def crop(self, node: str) -> None:
        """Pull its cable; its processes go on."""
        self._call("cut-node", node)

    def kill(self, node: str) -> None:
        """Its power fails."""
        self._call("kill-node", node)

    def heal(self, node: str) -> None:
        self._call("heal-node", node)

    def restart_controller(self) -> None:
        self._call("restart-head")

    def submit(self, script: str, log: Path, *options: str, **variables: str) -> str:
        """sbatch a script of slurm/, as it is. Returns the job's number."""
        variables = {"PYTHON": sys.executable, **variables}
        said = self.head("sbatch", f"--output={log}", *options, str(REPOSITORY / "slurm" / script), **variables)
        return said.split()[-1]

    def state(self, job: str) -> str:
        return self._field(job, "JobState")

    def hosts(self, job: str) -> list[str]:
        """Where a job runs, the host of its batch script first."""
        return self.head("scontrol", "show", "hostnames", self._field(job, "NodeList")).split()

    def restarts(self, job: str) -> int:
        return int(self._field(job, "Restarts"))

    def wait_for(self, job: str, *states: str, timeout: float = 120) -> str:
        """Return once the job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            late = time.monotonic() > deadline or state in _ENDS
            assert not late, f"job {job} is {state}, not {states}:\n{Path(self._field(job, 'StdOut')).read_text()}"
            time.sleep(0.3)
        return state

    def _field(self, job: str, name: str) -> str:
        shown = ""
        for _ in range(20):  # the controller may be starting again
            try:
                shown = self.head("scontrol", "show", "job", job)
                break
            except subprocess.CalledProcessError:
                time.sleep(0.5)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found is not None, f"no {name} of job {job} in:\n{shown}"
        return found[1]

    def _call(self, *words: str, **variables: str) -> str:
        done = subprocess.run(
            [str(SCRIPT), *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            env={**environment(), "MC_DIR": str(self.folder), **variables},
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, words, done.stdout, done.stderr)
        return done.stdout


def environment() -> dict[str, str]:
    """A user's, without what the tester's own session has set up."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MLFLOW_", "OMP_"))}
