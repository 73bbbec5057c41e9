"""A rank ends with the agent that started it, so that no orphan holds a GPU or a port.

Imported before anything that takes time to import. `python -m distrain.lifetime COMMAND ...` runs a command that ends
with the process that started it.
"""

import ctypes
import os
import select
import signal
import sys
import threading
from contextlib import suppress

AGENT_VARIABLE = "DISTRAIN_AGENT"  # process id of the agent that starts a rank, if it is ours
_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_agent() -> None:
    """Have the kernel kill this rank as soon as its agent ends. Exits at once if that has happened already.

    Does nothing in a process that no agent started.
    """
    if sys.platform != "linux":
        return
    try:
        if (agent := _find_agent()) is not None:
            end_with(agent)
    except ProcessLookupError:
        os.write(2, b"distrain: the process that started this rank is gone: the rank ends\n")
        os._exit(1)


def has_agent() -> bool:
    """Whether an agent, ours or torchrun's, has started this process as a rank."""
    try:
        return _find_agent() is not None
    except ProcessLookupError:  # it has ended
        return False


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the process `parent` ends.

    Raises ProcessLookupError if it has ended already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() == parent:
        return
    try:  # it may have started a wrapper, such as a shell, that started this process
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        raise
    except OSError:  # no such system call on this kernel
        return
    threading.Thread(target=_wait_and_end, args=(descriptor,), name="agent", daemon=True).start()


def tied(command: list[str]) -> list[str]:
    """The words that run `command` in a process that is killed when this one ends."""
    return [sys.executable, "-m", "distrain.lifetime", str(os.getpid()), *command]


def stop_agent() -> None:
    """Have torchrun end, if it would start its ranks again. Every rank calls it, and one of each node does it."""
    restarts, allowed = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restarts < allowed and os.environ.get("LOCAL_RANK") == "0":
        with suppress(ProcessLookupError):
            if (agent := _find_agent()) is not None:
                os.kill(agent, signal.SIGTERM)


def _find_agent() -> int | None:
    """The process that started this rank, or None if this is no rank. Raises ProcessLookupError if it has ended."""
    if AGENT_VARIABLE in os.environ:
        return int(os.environ[AGENT_VARIABLE])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # torchrun starts every rank, or a wrapper that starts the rank, in a session of its own.
    leader = os.getsid(0)
    agent = os.getppid() if leader == os.getpid() else _parent_of(leader)
    if agent is not None and not _is_python(agent):
        if leader != os.getpid() and not _was_started_by_torchrun(leader):
            return None  # a shell in which the variable is left over
        raise ProcessLookupError
    return agent


def _parent_of(process: int) -> int | None:
    try:
        with open(f"/proc/{process}/stat") as file:  # noqa: PTH123, pathlib takes longer to import than all else here
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _was_started_by_torchrun(process: int) -> bool:
    try:
        with open(f"/proc/{process}/environ", "rb") as file:  # noqa: PTH123
            return b"TORCHELASTIC_RUN_ID=" in file.read()
    except OSError:
        return False


def _is_python(process: int) -> bool:
    """Whether a process is a Python interpreter, as an agent is and the reaper of orphans is not."""
    try:
        return os.path.basename(os.readlink(f"/proc/{process}/exe")).startswith("python")  # noqa: PTH115, PTH119
    except OSError:  # another user's, such as init
        return process != 1


def _wait_and_end(descriptor: int) -> None:
    select.select([descriptor], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
