"""Memory that the ranks of a node share. It has no name, so that nothing is left of it when they are killed, and it is
not limited by the size of /dev/shm."""

import mmap
import os

from distrain.errors import TemporaryError
from distrain.parallel.group import Group


def new_memory_file(size: int) -> int:
    """The descriptor of a file of `size` zero bytes in memory."""
    file = os.memfd_create("distrain")
    os.ftruncate(file, size)
    return file


def share_on_node(group: Group, file: int = -1) -> mmap.mmap:
    """Return on every rank the content of the `file` that the first rank of its node passes. All ranks call this.

    The file is closed; the memory is freed with the last reference to it.
    """
    first = group.node[0]
    number, size = group.gather((file, os.fstat(file).st_size) if group.is_node_main else (-1, 0))[first]
    if not group.is_node_main:
        try:
            file = os.open(f"/proc/{group.peers[first].pid}/fd/{number}", os.O_RDWR)
        except OSError as error:
            raise TemporaryError(
                f"the memory of rank {first} cannot be shared with rank {group.rank} on the same host: {error.strerror}"
            ) from error
    try:
        memory = mmap.mmap(file, size)
        group.barrier()
    finally:
        os.close(file)
    return memory
