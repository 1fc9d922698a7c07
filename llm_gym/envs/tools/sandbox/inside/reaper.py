"""The first process of a session in a full tier: it watches, relays interrupts, and ends everything when it ends.

It is pid 1 of the session's pid namespace: orphans become its children, and when it ends, the kernel
ends all others. The session proper is not its child (see `full`), so it holds its pidfd.
"""

from __future__ import annotations

import os
import signal
import socket

from . import syscalls as sys_
from .wire import Channel, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

READY = b"ready "
"""What a session tells once it takes cells, with its pid after it; anything else is an error."""


def told(text: bytes) -> dict[str, Any]:
    """What the trainer hears of it."""
    return {"ready": True} if text.startswith(READY) else {"error": text.decode("utf-8", "replace") or "it died"}


def main(lease_fd: int, ready: int) -> NoReturn:
    """Lives until the session has ended, or its lease. `ready`: where the session tells that it has started."""
    try:
        sys_.close_others({lease_fd, ready})
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps orphans
        watch(Channel(socket.socket(fileno=lease_fd)), ready)
    finally:
        os._exit(0)


def watch(lease: Channel, ready: int) -> None:
    """Until the session ends, or its lease."""
    if lease in poll([lease, ready], None):
        return  # there is nothing to relay yet
    text = os.read(ready, 4096)
    os.close(ready)
    lease.send(told(text))
    if not text.startswith(READY):
        return
    pid = int(text.removeprefix(READY))
    try:
        session = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    while poll([lease, session], None) == [lease]:
        message, _ = lease.receive()
        if message is None:
            return
        try:
            os.killpg(pid, signal.SIGINT)
        except ProcessLookupError:
            return
