"""A connection between the launchers of two machines, and what the network says of it."""

from __future__ import annotations

import json
import select
import socket
import time

SILENCE_S = 60.0  # a machine without power closes no connection; a busy one may well be late by some seconds
BEAT_S = 1.0
LONGEST = 1 << 20  # bytes of one line


class Line:
    """One connection to another machine's launcher."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5.0)  # for sending; receiving never waits
        self.connection, self.closed, self.heard = connection, False, time.monotonic()
        self._rest, self._beat = b"", 0.0

    def send(self, **message: object) -> None:
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # receiving shows that it is gone, after what had come before

    def receive(self) -> list[dict]:
        """What has come in since the last call."""
        while not self.closed and select.select([self.connection], [], [], 0)[0]:
            try:
                data = self.connection.recv(1 << 16)
            except OSError:
                data = b""
            self.closed = not data or len(self._rest) > LONGEST
            self._rest += data
            self.heard = time.monotonic()
        *lines, self._rest = self._rest.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) for message in messages):  # somebody else's connection
            self.closed = True
            return []
        return messages

    @property
    def lost(self) -> str | None:
        """Why nothing more is to be expected of the other side, None while it is there."""
        if self.closed:
            return "its connection closed"
        silent = time.monotonic() - self.heard
        return f"nothing was heard of it for {silent:.0f} s" if silent > SILENCE_S else None

    def beat(self) -> None:
        """To be called often: tells the other side about once a second that this one lives."""
        if time.monotonic() - self._beat > BEAT_S:
            self._beat = time.monotonic()
            self.send(beat=True)


def interface_of(address: str) -> str | None:
    """The network interface that has this address: gloo would else ask the resolver for the machine's own name."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.split("%")[0] == address for one in addresses):
            return name
    # 127.0.0.2 and its like belong to the loopback interface without being listed
    return "lo" if address.startswith("127.") else None


def family_of(endpoint: tuple[str, int]) -> int:
    try:
        return socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        return socket.AF_INET
