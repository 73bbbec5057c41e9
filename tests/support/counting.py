"""Ranks that record what they ask of files: a line for each operation on a path, in PREFIX followed by the rank."""

import os
import resource
import signal
import sys
from pathlib import Path


def place_on_nodes(ranks: int) -> None:
    """Make this rank, before it starts, one of the `ranks` of its node."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % ranks)


def record_operations(prefix: Path, ranks_per_node: int) -> None:
    """Place this rank on a node and record its operations from now on."""
    from distrain import failpoints, train
    from distrain.checkpoint import Checkpointer

    place_on_nodes(ranks_per_node)
    record = os.open(f"{prefix}{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(kind: str, path: object = "") -> None:
        os.write(record, f"{kind} {os.fspath(path) if isinstance(path, (str, os.PathLike)) else ''}\n".encode())

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" or event.startswith("os."):
            write(event, arguments[0] if arguments else "")

    def recorded_stat(path, *arguments, **options):
        write("stat", path)
        return stat(path, *arguments, **options)

    def recorded_failpoint(name: str, step: int) -> None:
        failpoint(name, step)
        sockets = [path for path in Path("/proc/self/fd").iterdir() if _is_socket(path)]
        write(f"step {step} memory {_shared_memory()}")
        write(f"step {step} sockets {len(sockets)}")

    def recorded_restore(self):
        before = _bytes_read()
        restored = restore(self)
        write(f"restore read {_bytes_read() - before}")
        return restored

    stat, os.stat = os.stat, recorded_stat
    failpoint, train.failpoint = failpoints.failpoint, recorded_failpoint  # type: ignore[attr-defined]
    restore, Checkpointer.restore = Checkpointer.restore, recorded_restore  # type: ignore[method-assign]
    sys.addaudithook(audit)


def _is_socket(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()).startswith("socket:")
    except OSError:  # closed meanwhile
        return False


def _shared_memory() -> int:
    """Bytes that this process shares with the other ranks of its node."""
    ranges = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/memfd:distrain" in line
    ]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def _bytes_read() -> int:
    """Bytes that this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def few_open_files() -> None:
    """Make this process one of 1,024 ranks that may open 4,096 files."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1024", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))


def freeze_before_the_attempt(rank: int) -> None:
    """Suspend this process, if it is this rank, when it has met the others and has not begun to train."""
    from distrain import identity, train

    def check_resumable(*arguments):
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments)

    original, train.check_resumable = identity.check_resumable, check_resumable  # type: ignore[attr-defined]
