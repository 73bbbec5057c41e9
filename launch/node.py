"""`python -m launch node`: one node's processes, in a job that somebody starts on all its nodes.

torchrun's agent runs inside this process, so that the ranks' own exit codes get out, and so that no signal ends it:
what asks the job to stop is passed on to the ranks, and they save and end.
"""

import argparse
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from distrain.errors import EXIT_STOPPED, EXIT_USER, UserError
from launch.place import Place, count_ranks, variables

NAME = "DISTRAIN_HOST"  # what this node is called, for its ranks
_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_JOIN_S = {"distrain": 600, "launch.probe": 60}  # for all nodes to be there
_LAST_LINES = 20
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ")  # torch puts it before the lines of a traceback


def configure(parser: argparse.ArgumentParser) -> None:
    env = os.environ
    parser.add_argument("--nodes", type=int, default=int(env.get("SLURM_NNODES", 1)), help="of the job")
    parser.add_argument("--node", type=int, default=int(env.get("SLURM_NODEID", 0)), help="this one's number, from 0")
    parser.add_argument("--head", default="127.0.0.1", help="host name or address of node 0")
    parser.add_argument("--job", default="job", help="names this start of the job; the same on all nodes")
    parser.add_argument("--ranks", type=int, help="processes on this node (default: one per GPU, or 1)")
    parser.add_argument("--name", default=socket.gethostname(), help="of this node, in front of every line")
    parser.add_argument("--logs", type=Path, help="folder for the full output of every rank")
    parser.add_argument("--probe", action="store_true", help="examine the hosts instead of training on them")
    parser.add_argument("--attended", action="store_true", help="stop when standard input says so, or ends")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of python -m distrain, after --")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or every host without reverse DNS is a warning
    place = Place(args.node, args.nodes, args.head, args.job)
    ranks = args.ranks or count_ranks()
    os.environ.update({**variables(place, ranks), NAME: args.name})
    logs = make_folder(args.logs.resolve() / args.job) if args.logs else None
    requests = StopRequests()
    if args.attended:
        threading.Thread(target=requests.watch_stdin, daemon=True).start()
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    program = ["launch.probe" if args.probe else "distrain", *arguments]
    return supervise(place, ranks, args.name, logs, program, requests)


def supervise(
    place: Place, ranks: int, name: str, logs: Path | None, program: list[str], requests: "StopRequests"
) -> int:
    """Run the ranks until they end. Returns 0, 75 or 78 as they do, 1 for a crash."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launch.logs import RankLogs

    logging.disable(logging.ERROR)  # we report failures ourselves, and each of torch's loggers has its own level
    config = LaunchConfig(
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        nproc_per_node=ranks,
        run_id=place.job,
        role="distrain",
        rdzv_backend="static",
        rdzv_endpoint=f"{place.head}:{place.port}",
        rdzv_configs={"rank": place.node, "timeout": _JOIN_S[program[0]]},
        max_restarts=0,
        log_line_prefix_template=f"{name}:${{rank}} ",
        logs_specs=RankLogs(logs, name) if logs else DefaultLogsSpecs(tee=Std.ALL),
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", *program)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == EXIT_STOPPED or (requests.came and code in (-signal.SIGTERM, -signal.SIGUSR1)):
            return EXIT_STOPPED
        if code == EXIT_USER:
            return EXIT_USER
        report(name, rank, failure, logs)
        return 1
    except RuntimeError as error:  # torch's own: nobody at the head, a port taken
        print(f"launch: {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
        return 1
    return 0


def make_folder(path: Path) -> Path:
    """Raises UserError if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot hold the logs: {error.strerror}; set run.dir elsewhere") from error
    return path


def report(name: str, rank: int, failure: Any, logs: Path | None) -> None:
    """Write down the first failure on this node, in a file whose name sorts by time."""
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    text = f"rank {rank} on {name} (process {failure.pid}) ended with {how}"
    if logs is None:
        print(f"launch: {text}", file=sys.stderr, flush=True)
        return
    last = tail_traceback(logs / f"{name}-{rank}.err")
    when = f"{failure.timestamp}.{time.time_ns() % 10**9:09d}"
    (logs / f"failed-{when}-{name}.txt").write_text(f"{text}{':' if last else ''}\n{last}")


def tail_traceback(path: Path) -> str:
    """The last traceback in a log, or its last lines."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [_RANK_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    kept = lines[starts[-1] :] if starts else lines[-_LAST_LINES:]
    return "".join(f"{line}\n" for line in kept)


class StopRequests:
    """Passes on to the ranks what asks this process to stop: as SIGTERM, at which they save and end."""

    def __init__(self) -> None:
        self.came = False
        for number in _STOPPING:
            signal.signal(number, self._handle)

    def watch_stdin(self) -> None:
        """Whoever holds its other end asks for a stop by a line, or by letting go."""
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        for pid in children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def children() -> list[int]:
    """Process ids of this process's children, whichever of its threads started them."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
