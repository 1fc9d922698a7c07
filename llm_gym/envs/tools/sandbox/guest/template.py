"""The warmed process of a full tier: single-threaded, and forked for every session.

It hears nobody but the zygote, over the socket that it is started with, and ends with it. No session
can reach it: they are in pid namespaces below its own, and hold nothing of it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import sys
from typing import Any

from . import child, confine, room, warm
from . import syscalls as sys_
from .wire import Channel


def main() -> None:
    """`template FD HOUSE`: the zygote's orders, each `packages` to warm or a session; what `House` needs, in JSON."""
    orders = Channel(socket.socket(fileno=int(sys.argv[1])))
    orders.sock.set_inheritable(False)
    house = child.House(**json.loads(sys.argv[2]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the sessions
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    personalities: dict[str, warm.Personality] = {}
    home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    while True:
        order, fds = orders.receive(fds=16)
        if order is None:
            os._exit(0)
        if "packages" in order:
            try:
                personalities = ready_to_fork(house, order["packages"])
            except Exception as error:
                orders.send({"why": str(error)})
            else:
                orders.send({"threads": len(os.listdir("/proc/self/task"))})
        else:
            start(house, personalities, order, fds, home)


def ready_to_fork(house: child.House, packages: list[str]) -> dict[str, warm.Personality]:
    """Warms this process, and does beforehand what every session would do alike."""
    personalities = warm.warm(packages, house.base)
    child.settle(house, "/tmp")
    if not house.user_namespaces:
        confine.drop_bounding_set()
    confine.seccomp_program(True, ())
    sys_.top()
    for name in ("mount", "prctl", "syscall", "unshare"):
        getattr(sys_.libc, name)  # is looked up once
    sys_.prctl(sys_.PR_SET_DUMPABLE, 0)
    return personalities


def start(
    house: child.House, personalities: dict[str, warm.Personality], request: dict[str, Any], fds: list[int], home: int
) -> None:
    """Forks one session into the pid namespace `fds[-1]`; it tells at `fds[-2]`, its reaper hears."""
    *own, tell, space = fds
    try:
        sys_.setns(space, sys_.NEWPID)  # for the next child, not for this process
        if os.fork() == 0:
            isolate = functools.partial(room.isolate, request["disk"], request["uid"])
            child.main(house, personalities, request, own, tell, isolate, [])
    except OSError as error:  # its reaper may be dead already, and the namespace with it
        child.tell(tell, str(error).encode())
    finally:
        sys_.setns(home, sys_.NEWPID)
        for fd in fds:
            os.close(fd)
