"""`launch node`: run the ranks of one node. The launcher or srun starts it on every node of a job.

torchrun's agent runs in this process, so that the ranks' exit codes are not lost and a signal does not end the agent:
a stop signal is forwarded to the ranks, which save and exit.
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

import psutil

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, UserError
from launch.node_env import Node, count_ranks, rank_variables
from launch.restart import EXIT_CRASH

HOST_VARIABLE = "DISTRAIN_HOST"  # tells the ranks the name of their node
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_RENDEZVOUS_TIMEOUT_S = {"distrain": 600, "launch.doctor": 60}
_TAIL_LINES = 20
_RANK_PREFIX = re.compile(r"^\[rank\d+\]: ")  # torch prefixes the lines of a traceback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    env = os.environ
    parser.description = "Run the ranks of one node of a job."
    parser.add_argument(
        "--nodes", type=int, default=int(env.get("SLURM_NNODES", 1)), metavar="N", help="nodes of the job"
    )
    parser.add_argument(
        "--node-rank", type=int, default=int(env.get("SLURM_NODEID", 0)), metavar="K", help="rank of this node, from 0"
    )
    parser.add_argument("--head", default="127.0.0.1", metavar="HOST", help="host name or address of node 0")
    parser.add_argument("--job", default="job", metavar="ID", help="id of this start of the job, equal on all nodes")
    parser.add_argument("--ranks", type=int, metavar="M", help="processes on this node (default: one per GPU, or 1)")
    parser.add_argument(
        "--name", default=socket.gethostname(), help="name of this node, which prefixes every line of output"
    )
    parser.add_argument("--logs", type=Path, metavar="DIR", help="folder for the output of every rank")
    parser.add_argument("--doctor", action="store_true", help="check the hosts instead of training")
    parser.add_argument("--watch-stdin", action="store_true", help="stop at a line or the end of standard input")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: the arguments of distrain")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise torch warns about hosts without reverse DNS
    node = Node(args.node_rank, args.nodes, args.head, args.job)
    ranks = args.ranks or count_ranks()
    os.environ.update({**rank_variables(node, ranks), HOST_VARIABLE: args.name})
    logs = create_log_folder(args.logs.resolve() / args.job) if args.logs else None
    requests = StopRequests()
    if args.watch_stdin:
        threading.Thread(target=requests.watch_stdin, daemon=True).start()
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    program = ["launch.doctor" if args.doctor else "distrain", *arguments]
    return run_ranks(node, ranks, args.name, logs, program, requests)


def run_ranks(
    node: Node, ranks: int, name: str, logs: Path | None, program: list[str], requests: "StopRequests"
) -> int:
    """Run the ranks until they exit. Returns 0, 75 or 78 if they do, 1 for a crash."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launch.logs import RankLogs

    logging.disable(logging.ERROR)  # failures are reported below, and each of torch's loggers has its own level
    config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=ranks,
        run_id=node.job,
        role="distrain",
        rdzv_backend="static",
        rdzv_endpoint=f"{node.head}:{node.port}",
        rdzv_configs={"rank": node.rank, "timeout": _RENDEZVOUS_TIMEOUT_S[program[0]]},
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
        if code == EXIT_STOPPED or (requests.received and code in (-signal.SIGTERM, -signal.SIGUSR1)):
            return EXIT_STOPPED
        if code == EXIT_USER:
            return EXIT_USER
        report_failure(name, rank, failure, logs)
        return EXIT_CRASH
    except RuntimeError as error:  # from torch: the head does not answer, or its port is in use
        print(f"launch: {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
        return EXIT_CRASH
    return EXIT_DONE


def create_log_folder(path: Path) -> Path:
    """Create the folder and return it. Raises UserError if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create the log folder: {error.strerror}; set run.dir elsewhere") from error
    return path


def report_failure(name: str, rank: int, failure: Any, logs: Path | None) -> None:
    """Write the first failure on this node to a file whose name sorts by time, or to stderr without `logs`."""
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    text = f"rank {rank} on {name} (pid {failure.pid}) ended with {how}"
    if logs is None:
        print(f"launch: {text}", file=sys.stderr, flush=True)
        return
    tail = tail_traceback(logs / f"{name}-{rank}.err")
    when = f"{failure.timestamp}.{time.time_ns() % 10**9:09d}"
    (logs / f"failed-{when}-{name}.txt").write_text(f"{text}{':' if tail else ''}\n{tail}")


def tail_traceback(path: Path) -> str:
    """The last traceback in a log, or its last lines if there is none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [_RANK_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    tail = lines[starts[-1] :] if starts else lines[-_TAIL_LINES:]
    return "".join(f"{line}\n" for line in tail)


class StopRequests:
    """Forwards stop signals to the ranks as SIGTERM, at which they save and exit."""

    def __init__(self) -> None:
        self.received = False
        for number in _STOP_SIGNALS:
            signal.signal(number, self._handle)

    def watch_stdin(self) -> None:
        """Request a stop once standard input yields a line or is closed, as when the launcher dies."""
        sys.stdin.readline()
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGTERM)
