"""Heartbeats and alarms between the nodes of a job, by UDP: they need no server that may hang, and one may be lost."""

import hmac
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from distrain.parallel.group import Group
from distrain.resilience.heartbeats import Heartbeat

_SIGNATURE_BYTES = 16
_MAX_BYTES = 8192


class NodeMessages:
    """What the nodes tell each other: the first rank of each sends its heartbeat to the node before, in a ring, and any
    rank can send an alarm to all nodes. All ranks create theirs together.

    Where there is no way for messages, nothing is received, and nothing fails.
    """

    def __init__(self, group: Group) -> None:
        self._key = group.broadcast(secrets.token_bytes(32))  # so that other programs' messages are ignored
        self._socket: socket.socket | None = None
        self._family: int = socket.AF_INET
        own = None
        with suppress(OSError):
            own = self._open(group.is_main)
        names = group.gather(own if group.is_node_main else None)
        self._addresses = [self._resolve(names[node[0]]) for node in group.nodes]
        number = group.nodes.index(group.node)
        self._before = self._addresses[number - 1]
        self.next = group.nodes[(number + 1) % len(group.nodes)][0]
        """The rank whose heartbeats come here."""
        self.received: tuple[int, Heartbeat] | None = None
        """Number and content of its last heartbeat."""

    def send_heartbeat(self, number: int, beat: Heartbeat) -> None:
        """Send this rank's heartbeat to the node before."""
        self._send({"number": number, "beat": beat}, self._before)

    def send_alarm(self, text: str) -> None:
        """Tell all nodes why the attempt ends."""
        for address in self._addresses:
            self._send({"alarm": text}, address)

    def receive(self, seconds: float) -> str:
        """Receive for so many seconds; return the text of an alarm as soon as there is one, else ""."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._socket is None:
                time.sleep(left)
                continue
            self._socket.settimeout(left)
            with suppress(OSError):
                message = self._parse(self._socket.recv(_MAX_BYTES))
                if "alarm" in message:
                    return str(message["alarm"])
                if message:
                    self.received = message["number"], Heartbeat(*message["beat"])
        return ""

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _open(self, is_main: bool) -> tuple[str, int]:
        """Open a socket at this host's address towards the main rank's host; return where others reach it."""
        main, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._family, _, _, _, found = socket.getaddrinfo(main, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(self._family, socket.SOCK_DGRAM) as probe:
            probe.connect(found)  # sends nothing
            host = str(probe.getsockname()[0])
        opened = socket.socket(self._family, socket.SOCK_DGRAM)
        # The main rank's host may know itself by an address that only it can use: the others use the one they know.
        opened.bind(("" if is_main else host, 0))
        self._socket = opened
        return main if is_main else host, opened.getsockname()[1]

    def _resolve(self, name: tuple[str, int] | None) -> Any:
        if name is not None and self._socket is not None:
            with suppress(OSError):
                return socket.getaddrinfo(*name, self._family, socket.SOCK_DGRAM)[0][4]
        return None

    def _send(self, content: dict[str, Any], address: Any) -> None:
        data = json.dumps(content).encode()
        if self._socket is not None and address is not None:
            with suppress(OSError):
                self._socket.sendto(self._sign(data) + data, address)

    def _parse(self, received: bytes) -> dict[str, Any]:
        """The content of a message, {} if it is not of this attempt."""
        signature, data = received[:_SIGNATURE_BYTES], received[_SIGNATURE_BYTES:]
        content: dict[str, Any] = json.loads(data) if hmac.compare_digest(signature, self._sign(data)) else {}
        return content

    def _sign(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, "sha256")[:_SIGNATURE_BYTES]
