"""`launch node`: run the ranks of one node. The launcher or srun starts it on every node of a job.

torchrun's agent runs in this process, so that the ranks' exit codes are not lost and a signal does not end the agent:
a stop signal is forwarded to the ranks, which save and exit. If this process is killed, its ranks are too.
"""

import argparse
import logging
import os
import re
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from distrain.errors import EXIT_DONE, EXIT_STOPPED, EXIT_USER, TemporaryError, UserError
from distrain.files import may_pass, resolve
from distrain.lifetime import AGENT_VARIABLE
from distrain.open_files import raise_open_files
from distrain.output import keep_writing
from distrain.resilience.claim import LAUNCH_VARIABLE
from launch.node_env import Node, count_ranks, rank_variables
from launch.restart import EXIT_CRASH
from launch.stopping import StopRequests

HOST_VARIABLE = "DISTRAIN_HOST"  # tells the ranks the name of their node
_RENDEZVOUS_TIMEOUT_S = {"distrain": 600, "launch.check": 60}
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
    parser.add_argument(
        "--watch-stdin",
        action="store_true",
        help="stop at a line or the end of standard input; kill the ranks at the end that follows a line",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: the arguments of distrain")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    requests = StopRequests()
    keep_writing()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # otherwise torch warns about hosts without reverse DNS
    node = Node(args.node_rank, args.nodes, args.head, args.job)
    if args.watch_stdin:
        requests.watch_stdin()
        kill_earlier_starts(node)
    ranks = args.ranks or count_ranks()
    raise_open_files(node.count * ranks)
    os.environ |= rank_variables(node, ranks)
    os.environ |= {HOST_VARIABLE: args.name, LAUNCH_VARIABLE: node.launch, AGENT_VARIABLE: str(os.getpid())}
    logs = create_log_folder(resolve(args.logs) / args.job) if args.logs else None
    arguments = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    program = ["launch.check" if args.doctor else "distrain", *arguments]
    return run_ranks(node, ranks, args.name, logs, program, requests)


def run_ranks(node: Node, ranks: int, name: str, logs: Path | None, program: list[str], requests: StopRequests) -> int:
    """Run the ranks until they exit. Returns 0, 75 or 78 if they do, 1 for a crash."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from launch.logs import RankLogs
    from launch.rendezvous import meet

    logging.disable(logging.ERROR)  # failures are reported below, and each of torch's loggers has its own level
    timeout = _RENDEZVOUS_TIMEOUT_S[program[0]]
    config = LaunchConfig(
        min_nodes=node.count,
        max_nodes=node.count,
        nproc_per_node=ranks,
        run_id=node.job,
        role="distrain",
        rdzv_backend="static",
        rdzv_endpoint=f"{node.head}:{node.port}",
        rdzv_configs={"rank": node.rank, "timeout": timeout},
        max_restarts=0,
        log_line_prefix_template=f"{name}:${{rank}} ",
        logs_specs=RankLogs(logs, name) if logs else DefaultLogsSpecs(tee=Std.ALL),
        signals_to_handle="SIGQUIT",
    )
    try:
        store = meet(node, timeout)
        requests.start_ranks()
        elastic_launch(config, sys.executable)("-u", "-m", *program)
        del store  # until here it serves the ranks
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code == EXIT_STOPPED or (requests.received and code in (-signal.SIGTERM, -signal.SIGUSR1)):
            return EXIT_STOPPED
        if code == EXIT_USER:
            return EXIT_USER
        report_failure(name, rank, failure, logs)
        return EXIT_CRASH
    except (RuntimeError, TemporaryError, OSError) as error:  # from torch: the head does not answer, its port is in use
        print(f"launch: {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
        return EXIT_CRASH
    return EXIT_DONE


def kill_earlier_starts(node: Node) -> None:
    """Kill what an earlier start by the same launcher left on this host when the connection to it was lost: its ranks
    end with it, and would hold the GPUs."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "--watch-stdin" in words and any(node.is_newer_than(word) for word in words):
                process.kill()


def create_log_folder(path: Path) -> Path | None:
    """Create the folder and return it, or None if the disk does not allow it now: training does not depend on logs.

    Raises UserError if it cannot be created there at all.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not may_pass(error):
            raise UserError(f"{path}: cannot create the log folder: {error.strerror}; set run.dir elsewhere") from error
        print(f"launch: {path}: no log files are kept: {error.strerror}", file=sys.stderr, flush=True)
        return None
    return path


def report_failure(name: str, rank: int, failure: Any, logs: Path | None) -> None:
    """Write the first failure on this node to a file whose name sorts by time, or to stderr if that is impossible."""
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    text = f"rank {rank} on {name} (pid {failure.pid}) ended with {how}"
    if logs is not None:
        when = f"{failure.timestamp}.{time.time_ns() % 10**9:09d}"
        report = logs / f"failed-{when}-{name}.txt"
        try:
            tail = tail_traceback(logs / f"{name}-{rank}.err")
            report.write_text(f"{text}{':' if tail else ''}\n{tail}")
            return
        except OSError:  # a full disk leaves it empty
            with suppress(OSError):
                report.unlink(missing_ok=True)
    print(f"launch: {text}", file=sys.stderr, flush=True)


def tail_traceback(path: Path) -> str:
    """The last traceback in a log, or its last lines if there is none."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = [_RANK_PREFIX.sub("", line) for line in text.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    tail = lines[starts[-1] :] if starts else lines[-_TAIL_LINES:]
    return "".join(f"{line}\n" for line in tail)
