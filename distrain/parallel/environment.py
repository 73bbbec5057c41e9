"""The rank of this process, as torchrun or another launcher set it in the environment."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from distrain.errors import UserError
from distrain.lifetime import has_agent

log = logging.getLogger(__name__)

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
RANK_VARIABLES = (*_NUMBERS, "MASTER_ADDR")
"""Variables that make a process one rank of several."""
_REPORT_WAITING_S = 3.0
_CURE = "unset it, or start the ranks with torchrun or `python -m launch`"


@dataclass(frozen=True)
class Environment:
    """A world of one unless a launcher says otherwise."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launched: bool = False
    """Whether a launcher has set where the ranks meet."""
    ignored: tuple[str, ...] = ()
    """Variables that are set and empty."""


def read_environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """The rank of this process. Variables of other launchers (SLURM_*, OMPI_*) do not matter.

    Raises UserError for variables that are no numbers, or that do not fit together, such as leftovers of another job.
    """
    found = {name: value.strip() for name, value in variables.items() if name in _NUMBERS and value.strip()}
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"{name}={value} in the environment is not a number: {_CURE}")
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in found and other not in found:
            raise UserError(f"{name}={found[name]} is set in the environment and {other} is not: {_CURE}")
    rank, world = int(found.get("RANK", 0)), int(found.get("WORLD_SIZE", 1))
    if rank >= world:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world} in the environment: ranks count from 0; {_CURE}")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and not variables.get(name, "").strip():
            raise UserError(f"WORLD_SIZE={world} is set in the environment and {name} is not: {_CURE}")
    return Environment(
        rank=rank,
        world=world,
        local_rank=int(found.get("LOCAL_RANK", 0)),
        local_world=max(1, int(found.get("LOCAL_WORLD_SIZE", 1))),
        launched="RANK" in found and "MASTER_PORT" in found and bool(variables.get("MASTER_ADDR", "").strip()),
        ignored=tuple(name for name in _NUMBERS if name in variables and name not in found),
    )


def rank_or_zero() -> int:
    """The rank of this process; 0 if the environment is not valid, so that the error is printed."""
    try:
        return read_environment().rank
    except UserError:
        return 0


@contextmanager
def report_waiting(environment: Environment) -> Iterator[None]:
    """Say what is awaited if connecting to the other ranks takes seconds, unless an agent starts them all: in a
    terminal the variables may be left over, and no other rank will come."""
    if environment.world == 1 or has_agent():
        yield
        return
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    text = (
        f"rank {environment.rank} waits for all {environment.world} ranks to connect to {where}, as RANK, WORLD_SIZE, "
        "MASTER_ADDR and MASTER_PORT in the environment say; if nothing starts the others, unset these variables"
    )
    timer = threading.Timer(_REPORT_WAITING_S, log.warning, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
