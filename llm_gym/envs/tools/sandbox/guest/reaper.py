"""The first process of a session in a full tier: it watches, relays interrupts, and ends everything when it ends.

It is pid 1 of the session's pid namespace: orphans become its children, and when it ends, the kernel
ends all others. The session proper is not its child (see `full`), so it holds its pidfd.
"""

from __future__ import annotations

import json
import os
import select
import signal

from . import syscalls as sys_

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

READY = b"ready "
"""What a session tells once it takes cells, with its pid after it; anything else is an error."""
INTERRUPTED = b'{"interrupted": true}\n'
"""What the trainer hears once the session has been sent SIGINT: from then on it can only meet the cell it is for."""
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
"""Set before the fork. Without SIGCHLD the kernel reaps orphans."""


def told(text: bytes) -> bytes:
    """What the trainer hears of it: a line of JSON."""
    if text.startswith(READY):
        return b'{"ready": true}\n'
    return json.dumps({"error": text.decode("utf-8", "replace") or "it died"}).encode() + b"\n"


def main(lease: int, ready: int) -> NoReturn:
    """Lives until the session has ended, or its lease. `ready`: where the session tells that it has started."""
    try:
        sys_.close_others({lease, ready})
        watch(lease, ready)
    finally:
        os._exit(0)


def watch(lease: int, ready: int) -> None:
    """Until the session ends, or its lease. It keeps to few and simple calls: each touches pages to be copied."""
    poller = select.poll()
    poller.register(lease, select.POLLIN)
    poller.register(ready, select.POLLIN)
    if poller.poll()[0][0] == lease:
        return  # there is nothing to relay yet
    text = os.read(ready, 4096)
    os.write(lease, told(text))
    if not text.startswith(READY):
        return
    pid = int(text[len(READY) :])
    session = os.pidfd_open(pid)
    poller.unregister(ready)
    poller.register(session, select.POLLIN)
    while [fd for fd, _ in poller.poll()] == [lease] and os.read(lease, 4096):
        os.killpg(pid, signal.SIGINT)  # whatever comes over the lease
        os.write(lease, INTERRUPTED)
