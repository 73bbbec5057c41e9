"""`python -m launch`: one command for one machine, many machines, or a cluster."""

import argparse
import os
import sys
from pathlib import Path

from distrain import config
from distrain.errors import EXIT_DONE, EXIT_USER, UserError
from launch import node
from launch import slurm as batch
from launch.place import count_ranks
from launch.supervise import Host, Job, read_hosts

_SSH = (
    "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
)  # fmt: skip

_EXIT_CODES = """\
exit codes: 0 done; 75 stopped on request, all saved: run it again; 78 a mistake that the message names;
anything else: given up. A crash in between is followed by another start, from the last checkpoint on."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="launch", description="Start a run on the processes of one machine, of many, or of a Slurm cluster."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    local = commands.add_parser(
        "local",
        help="this machine, as one node or as several",
        description="Train on this machine. With --nodes N it plays N machines that share its processors and GPUs.",
        epilog=_EXIT_CODES,
    )
    local.add_argument("--nodes", type=int, default=1, metavar="N", help="machines to play (default 1)")
    add_training(local)
    local.set_defaults(run=run_local)

    ssh = commands.add_parser(
        "ssh",
        help="machines that ssh reaches",
        description="Train on machines that ssh reaches without a password, and that share this folder, the data and "
        "run.dir under the same paths.",
        epilog=_EXIT_CODES,
    )
    add_hosts(ssh)
    ssh.add_argument(
        "--min-nodes", type=int, metavar="N", help="go on with so many when others are lost (default: wait for all)"
    )
    ssh.add_argument("--no-doctor", action="store_true", help="do not examine the hosts before the start")
    add_training(ssh)
    ssh.set_defaults(run=run_ssh)

    slurm = commands.add_parser(
        "slurm",
        help="a Slurm cluster",
        description="Submit a job that trains a configuration, is requeued when it is preempted or runs out of time, "
        "and ends when the run is done. README tells of the variables that it heeds.",
    )
    batch.configure(slurm)
    add_configuration(slurm)
    slurm.set_defaults(run=batch.run)

    doctor = commands.add_parser(
        "doctor",
        help="examine the hosts of a run before it starts",
        description="Compare hosts: processors or GPUs, drivers, the network between them, clocks, disks, whether "
        "they can read the data, and whether they have the same code and configuration. Names those that are unfit.",
        epilog="exit codes: 0 all are fit; 78 one is not",
    )
    add_hosts(doctor)
    doctor.add_argument("--nodes", type=int, default=1, metavar="N", help="without hosts: play N of them here")
    add_training(doctor)
    doctor.set_defaults(run=run_doctor)

    node.configure(commands.add_parser("node", help="one node's share; what all of the above start on every machine"))
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_USER


def add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="M", help="processes on each node (default: one per GPU, or 1)")
    add_configuration(parser)


def add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="A,B,...", help="their names, the first being where all meet")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="or a file with one a line")


def training_arguments(args: argparse.Namespace) -> list[str]:
    return [*(["--config", args.config] if args.config else []), *args.overrides]


def simulated_hosts(nodes: int, ranks: int | None) -> list[Host]:
    """Hosts on this machine, which share its processors."""
    if nodes < 1 or (ranks is not None and ranks < 1):
        raise UserError("--nodes and --ranks must be at least 1")
    threads = max(1, len(os.sched_getaffinity(0)) // (nodes * (ranks or count_ranks())))
    variables = {"OMP_NUM_THREADS": str(threads)}
    return [Host(f"node{number}", "127.0.0.1", variables=variables) for number in range(nodes)]


def hosts_by_ssh(args: argparse.Namespace) -> list[Host]:
    names = read_hosts(args.hosts, args.hostfile)
    return [Host(name, name.rpartition("@")[2], command=(*_SSH, name)) for name in names]


def run_local(args: argparse.Namespace) -> int:
    hosts = simulated_hosts(args.nodes, args.ranks)
    settings = config.load(args.config, args.overrides)
    config.check_ranks(settings, args.nodes * (args.ranks or count_ranks()))
    with Job(settings, hosts, args.ranks, training_arguments(args), len(hosts)) as job:
        return job.run()


def run_ssh(args: argparse.Namespace) -> int:
    hosts = hosts_by_ssh(args)
    fewest = args.min_nodes or len(hosts)
    if not 1 <= fewest <= len(hosts):
        raise UserError(f"--min-nodes {fewest} must be from 1 to the {len(hosts)} hosts there are")
    settings = config.load(args.config, args.overrides)
    with Job(settings, hosts, args.ranks, training_arguments(args), fewest) as job:
        if not args.no_doctor and (code := job.examine()) != EXIT_DONE:
            return code
        return job.run()


def run_doctor(args: argparse.Namespace) -> int:
    hosts = hosts_by_ssh(args) if args.hosts or args.hostfile else simulated_hosts(args.nodes, args.ranks)
    settings = config.load(args.config, args.overrides)
    with Job(settings, hosts, args.ranks, training_arguments(args), len(hosts)) as job:
        return job.examine()


if __name__ == "__main__":
    sys.exit(main())
