"""The limit of open files, which a rank needs for its connections to all others."""

import math
import resource
from contextlib import suppress

from distrain.errors import UserError

_GROUPS = 3  # in which every rank is connected to every other: gradients, control, background
_OTHER = 48  # files, libraries, messages of the watchdog
_FREE = 3 / 4  # of the limit: each of two sets of shards may have an eighth of it open
_ENOUGH = 1 << 20  # some programs get slow with an unlimited number


def count_open_files(world: int) -> int:
    """How many files and sockets a process of a job of `world` ranks has open at most."""
    store = world if world > 1 else 0  # through which they meet, on the main rank: one connection from each
    return math.ceil((_GROUPS * (world - 1) + store + _OTHER) / _FREE)


def raise_open_files(world: int) -> None:
    """Raise this process's limit of open files, which its children inherit.

    Raises UserError if that is not allowed as far as `world` ranks need.
    """
    needed = count_open_files(world)
    limit, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (limit, allowed):
        allowed = _ENOUGH
    wanted = min(allowed, max(needed, _ENOUGH))
    if 0 <= limit < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            limit = wanted
    if 0 <= limit < needed:
        raise UserError(
            f"{world:,} ranks need {needed:,} open files per process, and the hard limit (ulimit -Hn) here is "
            f"{limit:,}: raise it on every host, in /etc/security/limits.conf or with LimitNOFILE= of the service"
        )
