"""Small JSON messages, with file descriptors, over a Unix stream socket: one line each."""

from __future__ import annotations

import json
import select
import socket
from typing import Any

LONGEST = 1 << 16
"""Bytes of one message; who sends more without a newline is treated as gone."""


class Channel:
    """One end of a conversation in JSON lines.

    What the other end sends is not trusted: a line that is no JSON object is skipped, descriptors are
    taken only where `receive(fds=n)` asks for them (the kernel drops the others), and a line longer
    than `LONGEST` reads as the end.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        self._fds: list[int] = []

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """A channel, and the socket to hand to the other process."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(near), far

    def fileno(self) -> int:
        """The descriptor, to poll; -1 once closed."""
        return self.sock.fileno()

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> bool:
        """Sends one message; whether the other end still takes messages. Never blocks for long ones."""
        return self.send_line(json.dumps(message).encode(), fds or [])

    def send_line(self, line: bytes, fds: list[int]) -> bool:
        """The same for a message that is a line already."""
        try:
            socket.send_fds(self.sock, [line + b"\n"], fds)
        except (OSError, ValueError):
            return False
        return True

    def receive(self, fds: int = 0) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and the descriptors that came with it; (None, []) at the end. Blocks.

        A stream joins what was sent without descriptors to what follows: where only some messages
        carry descriptors, these may be returned with an earlier one.
        """
        taken: list[int] = []
        while True:
            line, found = self.receive_line(fds)
            taken += found
            if line is None:
                return None, []
            if (message := _parse(line)) is not None:
                return message, taken

    def receive_line(self, fds: int = 0) -> tuple[bytes | None, list[int]]:
        """The next message as it came, for a sender that is trusted, or to pass it on."""
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                taken, self._fds = self._fds, []
                return line, taken
            if not self._fill(fds):
                return None, []

    def pending(self) -> bool:
        """Whether `receive` would return without blocking (or has reached the end)."""
        return b"\n" in self._buffer or bool(poll([self], 0))

    def _fill(self, fds: int) -> bool:
        try:
            if fds:
                data, taken, _, _ = socket.recv_fds(self.sock, LONGEST, fds)
                self._fds += taken
            else:
                data = self.sock.recv(LONGEST)
        except OSError:
            return False
        self._buffer += data
        return bool(data) and len(self._buffer) <= LONGEST

    def close(self) -> None:
        """Closes this end; the other reads the end of the stream."""
        self.sock.close()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def poll(files: list[Any], seconds: float | None) -> list[Any]:
    """Those of `files` (descriptors, or objects with `fileno`) that are readable or ended, within `seconds`."""
    poller = select.poll()
    numbers = {(f if isinstance(f, int) else f.fileno()): f for f in files}
    for number in numbers:
        poller.register(number, select.POLLIN)
    ready = poller.poll(None if seconds is None else max(0.0, seconds) * 1000)
    return [numbers[number] for number, _ in ready]
