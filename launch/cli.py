"""The command line of the launcher: `distrain launch COMMAND` or `python -m launch COMMAND`."""

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from distrain import config
from distrain.arguments import AnyOrder, add_run_arguments, run_arguments
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from distrain.sweep import cli as sweep
from launch import node, slurm
from launch.job import Host, Job, read_hosts, run_together
from launch.node_env import visible_gpus

_DESCRIPTION = "Start a run on one machine, many machines or a Slurm cluster."

_SSH = (
    "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "--",
)  # fmt: skip

# Of the terminal's environment, what every host needs: tracking, storage, proxies, threads.
_FORWARDED = re.compile(r"MLFLOW_\w+|AWS_\w+|FSSPEC_\w+|(HTTPS?|NO|ALL)_PROXY|OMP_NUM_THREADS", re.IGNORECASE)

_EXIT_CODES = """\
exit codes: 0 done; 75 stopped on request, everything saved: run it again to continue; 78 a mistake that the message
names; else the launcher gave up. After a crash it starts the run again from the last checkpoint."""


def main() -> int:
    """Parse the command line of `python -m launch`, run it and return the exit code."""
    parser = AnyOrder(prog="python -m launch", description=_DESCRIPTION)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_USER


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands local, ssh, sweep, slurm, doctor and node."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=AnyOrder)
    local = commands.add_parser(
        "local",
        help="train on this machine",
        description="Train on this machine. --nodes N simulates N nodes, which share its cores and GPUs.",
        epilog=_EXIT_CODES,
    )
    local.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes to simulate (default 1)")
    _add_training(local)
    local.set_defaults(run=run_local)

    ssh = commands.add_parser(
        "ssh",
        help="train on hosts reachable by ssh",
        description="Train on hosts that ssh reaches without a password. The working directory, the Python "
        "environment, the data and run.dir must have the same paths on all hosts, and run.dir must be shared. "
        "Variables named MLFLOW_*, AWS_*, FSSPEC_*, *_PROXY and OMP_NUM_THREADS are passed on, and not on a command "
        "line, which other users could see.",
        epilog=_EXIT_CODES,
    )
    _add_hosts(ssh)
    ssh.add_argument(
        "--min-nodes",
        type=int,
        metavar="N",
        help="after losing hosts, continue with at least N (default: wait until all are back)",
    )
    ssh.add_argument("--no-doctor", action="store_true", help="skip the health check of the hosts")
    _add_training(ssh)
    ssh.set_defaults(run=run_ssh)

    _add_sweep(commands.add_parser("sweep", help="train the networks of a sweep on several hosts"))

    batch = commands.add_parser(
        "slurm",
        help="submit a job to a Slurm cluster",
        description="Submit a batch job that trains a configuration. It is requeued when it is preempted or reaches "
        "its time limit, and ends when the run is done. README lists the environment variables it reads.",
    )
    slurm.add_arguments(batch)
    add_run_arguments(batch)
    batch.set_defaults(run=slurm.run)

    doctor = commands.add_parser(
        "doctor",
        help="check the hosts of a run before it starts",
        description="Compare hosts: cores or GPUs, drivers, the network between them, clocks, disks, access to the "
        "data, whether run.dir is shared, code and configuration. Prints every unhealthy host with the reason.",
        epilog="exit codes: 0 all hosts are healthy; 78 at least one is not; else the check failed",
    )
    _add_hosts(doctor)
    _add_nodes(doctor)
    _add_training(doctor)
    doctor.set_defaults(run=run_doctor)

    node.add_arguments(
        commands.add_parser("node", help="run the ranks of one node; the other commands start this on every node")
    )


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run `distrain sweep run` on several hosts that share the folder of the sweep: each claims networks to train, "
        "and a host may be lost or come back. Without hosts, --nodes N simulates N nodes on this machine."
    )
    parser.usage = "%(prog)s [--hosts A,B,... | --hostfile FILE | --nodes N] -- SPACE... --out DIR [option ...]"
    parser.epilog = _EXIT_CODES
    _add_hosts(parser)
    _add_nodes(parser)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="after --: the arguments of distrain sweep run")
    parser.set_defaults(run=run_sweep)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="M", help="processes per node (default: one per GPU, or 1)")
    add_run_arguments(parser)


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="A,B,...", help="host names; the ranks rendezvous on the first")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="file with one host name per line")


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="without hosts: nodes to simulate on this machine (default 1)"
    )


def simulated_hosts(nodes: int, ranks: int | None) -> list[Host]:
    """Hosts that are all this machine and share its cores and GPUs. Raises UserError for numbers below 1, and for more
    ranks than GPUs."""
    if nodes < 1 or (ranks is not None and ranks < 1):
        raise UserError("--nodes and --ranks must be at least 1")
    gpus = visible_gpus()
    share = ranks or max(1, len(gpus) // nodes)
    if gpus and nodes * share > len(gpus):
        raise UserError(
            f"{nodes * share} ranks need as many GPUs, and this machine has {len(gpus)}: lower --nodes or --ranks, or "
            "hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    threads = max(1, len(os.sched_getaffinity(0)) // (nodes * share))
    shared = {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(threads)}
    hosts = []
    for number in range(nodes):
        own = gpus[number * share : (number + 1) * share]
        variables = shared | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})
        hosts.append(Host(f"node{number}", "127.0.0.1", variables=variables))
    return hosts


def ssh_hosts(args: argparse.Namespace) -> list[Host]:
    """The hosts of --hosts or --hostfile, with or without USER@. Raises UserError if there are none."""
    names = read_hosts(args.hosts, args.hostfile)
    secrets = {name: value for name, value in os.environ.items() if _FORWARDED.fullmatch(name) and "\n" not in value}
    return [Host(name, name.rpartition("@")[2], command=(*_SSH, name), secrets=secrets) for name in names]


def run_local(args: argparse.Namespace) -> int:
    hosts = simulated_hosts(args.nodes, args.ranks)
    settings = config.load(args.config, args.overrides)
    config.check_ranks(settings, args.nodes * (args.ranks or max(1, len(visible_gpus()) // args.nodes)))
    with Job(settings.run.folder, hosts, args.ranks, run_arguments(args), len(hosts)) as job:
        return job.run()


def run_ssh(args: argparse.Namespace) -> int:
    hosts = ssh_hosts(args)
    min_hosts = args.min_nodes or len(hosts)
    if not 1 <= min_hosts <= len(hosts):
        raise UserError(f"--min-nodes {min_hosts} must be between 1 and the number of hosts, {len(hosts)}")
    settings = config.load(args.config, args.overrides)
    with Job(settings.run.folder, hosts, args.ranks, run_arguments(args), min_hosts) as job:
        if not args.no_doctor and (code := job.check_hosts()) != EXIT_DONE:
            return code
        return job.run()


def run_doctor(args: argparse.Namespace) -> int:
    settings = config.load(args.config, args.overrides)
    hosts = _any_hosts(args, args.ranks)
    with Job(settings.run.folder, hosts, args.ranks, run_arguments(args), len(hosts)) as job:
        return job.check_hosts()


def run_sweep(args: argparse.Namespace) -> int:
    from distrain.sweep.runner import share_machine

    words = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    parser = AnyOrder(prog="python -m launch sweep")
    sweep.add_arguments(parser)
    folder = parser.parse_args(["run", *words]).out
    hosts = _any_hosts(args, 1)
    if not hosts[0].command:  # simulated: each trains as many networks at a time as it has cores
        slots = share_machine(len(hosts), 0)
        hosts = [replace(host, cores=slot.cores) for host, slot in zip(hosts, slots, strict=True)]
    return run_together([Job(folder, [host], 1, ["sweep", "run", *words], 1) for host in hosts])


def _any_hosts(args: argparse.Namespace, ranks: int | None) -> list[Host]:
    return ssh_hosts(args) if args.hosts or args.hostfile else simulated_hosts(args.nodes, ranks)
