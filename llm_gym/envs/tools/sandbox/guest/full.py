"""How a full tier starts a session: a small first process, and beside it a copy of the template."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

from . import reaper
from . import syscalls as sys_
from .wire import Channel, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


class Full:
    """Sessions with namespaces of their own.

    Every session gets a pid namespace, whose first process (the reaper) is forked from this small
    process; the session proper is forked into that namespace by the template, which alone is warm.
    A copy of it is dear, so there is one of it per session, not two. This process is pid 1 of the
    sandbox: when it ends, the kernel ends the template and every session.
    """

    def __init__(self, house: dict[str, Any], trainer: list[int]) -> None:
        for fd in trainer:
            os.set_inheritable(fd, False)
        self.orders, far = Channel.pair()
        if os.fork() == 0:
            become_template(far, house)
        far.close()
        self.watched = [*trainer, self.orders]
        self.home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        for number in reaper.IGNORED:
            signal.signal(number, signal.SIG_IGN)
        sys_.top()
        sys_.prctl(sys_.PR_SET_DUMPABLE, 0)  # the reapers' too: nobody may look into them

    def start(self, request: bytes, fds: list[int]) -> tuple[int, int | None]:
        """Forks the reaper, and has the template fork the session beside it; only that one reads the request."""
        ready, tell = os.pipe()
        try:
            pid, space = self.make_namespace(fds[0], ready)
            self.orders.send_line(request, [*fds[1:], tell, space])  # a template that is gone ends `serve`
            os.close(space)
        finally:
            os.close(ready)
            os.close(tell)
        return pid, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None

    def make_namespace(self, lease: int, ready: int) -> tuple[int, int]:
        """A new pid namespace with a reaper as its first process: that one's pid, and the namespace."""
        sys_.unshare(sys_.NEWPID)  # for the next child, not for this process
        try:
            pid = os.fork()
            if pid == 0:
                reaper.main(lease, ready)
            # Only now, with its first process, can the namespace be joined.
            return pid, os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            sys_.setns(self.home, sys_.NEWPID)

    def warm(self, packages: list[str]) -> int:
        """Has the template warm itself."""
        self.orders.send({"packages": packages})
        if self.orders not in poll(self.watched, None):
            return 0
        message, _ = self.orders.receive()
        if message is not None and "why" in message:
            raise ImportError(message["why"])
        return 0 if message is None else int(message["threads"])

    def end(self) -> None:
        """Nothing: with this process everything ends, and the scratch folders are the kernel's."""


def become_template(orders: socket.socket, house: dict[str, Any]) -> NoReturn:
    """Starts the template's own interpreter in this process, so that nothing here grows with it."""
    try:
        orders.set_inheritable(True)
        code = "from guest.template import main; main()"
        os.execv(sys.executable, [sys.executable, "-s", "-c", code, str(orders.fileno()), json.dumps(house)])
    finally:
        os._exit(71)
