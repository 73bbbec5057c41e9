"""The heartbeats of a node's ranks, and an alarm for all of them, in memory that they share."""

import struct
from typing import NamedTuple

from distrain.parallel.group import Group
from distrain.parallel.shared_memory import new_memory_file, share_on_node

_SLOT = struct.Struct("<qqq24s")
_SLOT_BYTES = 64
_ALARM_BYTES = 1024
DONE = -1


class Heartbeat(NamedTuple):
    """The progress of a rank."""

    beats: int = 0
    """Rises with every sign of progress; DONE once the rank need not be watched any more."""
    phase: str = "start"
    step: int = 0


class NodeHeartbeats:
    """What each rank of this node has written last. All ranks of the job create theirs together."""

    def __init__(self, group: Group) -> None:
        size = _ALARM_BYTES + len(group.node) * _SLOT_BYTES
        self._first = group.node[0]
        self._memory = share_on_node(group, new_memory_file(size) if group.is_node_main else -1)

    def write(self, rank: int, number: int, beat: Heartbeat) -> None:
        """Write this rank's heartbeat. `number` rises each time, also without progress."""
        _SLOT.pack_into(self._memory, self._offset(rank), number, beat.beats, beat.step, beat.phase.encode()[:24])

    def read(self, rank: int) -> tuple[int, Heartbeat]:
        """Number and content of a rank's last heartbeat. The number rises as long as its process is not frozen."""
        number, beats, step, phase = _SLOT.unpack_from(self._memory, self._offset(rank))
        return number, Heartbeat(beats, phase.rstrip(b"\0").decode(errors="replace"), step)

    def set_alarm(self, text: str) -> None:
        """Tell all ranks of the node why they end."""
        self._memory[1:_ALARM_BYTES] = text.encode()[: _ALARM_BYTES - 1].ljust(_ALARM_BYTES - 1, b"\0")
        self._memory[0] = 1  # last, so that nobody reads half of it

    def alarm(self) -> str:
        """Why the ranks of the node end; "" while there is no reason."""
        if not self._memory[0]:
            return ""
        return self._memory[1:_ALARM_BYTES].rstrip(b"\0").decode(errors="replace")

    def _offset(self, rank: int) -> int:
        return _ALARM_BYTES + (rank - self._first) * _SLOT_BYTES
