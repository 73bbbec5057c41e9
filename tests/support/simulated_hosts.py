"""A Slurm cluster of several nodes on this machine, each in separate namespaces; see minicluster.sh."""

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
_FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")


def why_not() -> str | None:
    """What this machine lacks to simulate a cluster, if anything."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in _PROGRAMS if shutil.which(program, path=path) is None]
    if os.geteuid() != 0:
        return "needs root to create namespaces"
    return f"needs {', '.join(missing)} (see the top of {SCRIPT.name})" if missing else None


class Cluster:
    """Nodes n1, n2, ... and a head. A context manager that starts them and cleans up everything."""

    def __init__(self, nodes: int) -> None:
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))  # a short path, because it holds sockets

    def __enter__(self) -> "Cluster":
        self._call("up", str(len(self.nodes)))
        return self

    def __exit__(self, *error: object) -> None:
        self._call("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def head(self, *words: str, **variables: str) -> str:
        """Run a command on the login node; return its output."""
        return self._call("exec", *words, **variables)

    def on(self, node: str, *words: str) -> str:
        return self._call("on", node, *words)

    def disconnect(self, node: str) -> None:
        """Disconnect it from the network; its processes keep running."""
        self._call("disconnect-node", node)

    def kill(self, node: str) -> None:
        """Simulate a power failure."""
        self._call("kill-node", node)

    def restore(self, node: str) -> None:
        """Reconnect or boot it, and wait until Slurm may use it."""
        self._call("restore-node", node)

    def restart_controller(self) -> None:
        self._call("restart-head")

    def submit(self, script: str, log: Path, *options: str, **variables: str) -> str:
        """Submit an unmodified script of slurm/. Returns the job id."""
        variables = {"PYTHON": sys.executable, **variables}
        output = self.head("sbatch", f"--output={log}", *options, str(REPOSITORY / "slurm" / script), **variables)
        return output.split()[-1]

    def state(self, job: str) -> str:
        return self._field(job, "JobState")

    def hosts(self, job: str) -> list[str]:
        """The nodes of a job, the one with its batch script first."""
        return self.head("scontrol", "show", "hostnames", self._field(job, "NodeList")).split()

    def restarts(self, job: str) -> int:
        return int(self._field(job, "Restarts"))

    def wait_for(self, job: str, *states: str, timeout: float = 800) -> str:
        """Return once the job is in one of these states."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            failed = time.monotonic() > deadline or state in _FINAL_STATES
            assert not failed, f"job {job} is {state}, not {states}:\n{Path(self._field(job, 'StdOut')).read_text()}"
            time.sleep(0.3)
        return state

    def _field(self, job: str, name: str) -> str:
        shown = ""
        for _ in range(20):  # the controller may be restarting
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
    """A user's environment, without variables of the developer's session."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MLFLOW_", "OMP_"))}
