"""Which process is meant: ids are used again, and hold on one machine only."""

import os
from pathlib import Path


def process_ticks(pid: int) -> int | None:
    """When a process was created, in clock ticks since the boot; None if it has ended.

    From /proc, as psutil's create_time changes with the clock.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def machine_id() -> str:
    """The boot and the namespace in which process ids of this process are valid."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115, not a path
