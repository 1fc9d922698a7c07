"""The zygote: warmed once, single-threaded, and forked for every session.

It is told over one socket to start sessions; each request brings the descriptors that its session
needs, the first of which is the session's *lease*: closing it ends the session. The zygote ends with
its socket, or with the trainer (whose pidfd it is given first).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from . import reaper, warm
from . import syscalls as sys_
from .wire import Channel, poll


@dataclass(frozen=True)
class House:
    """What every session of this zygote shares."""

    namespaces: bool
    """Each session gets pid, mount, network, ipc and host name namespaces of its own."""
    user_namespaces: bool
    """... and a user namespace, because the zygote is not the machine's root."""
    landlock: bool
    seccomp: bool
    path: list[str]
    """Where the session's Python finds its packages."""
    readable: list[str]
    """What Landlock lets a session read."""
    hidden: list[str]
    """Exceptions to `readable`."""
    base: str
    """Where scratch folders are made when there is no tmpfs for each; the zygote removes it when it ends."""
    trainer: int | None
    """The trainer's pidfd."""


def start(house: House, request: dict[str, Any], fds: list[int]) -> tuple[int, int | None]:
    """Forks one session; the pid and pidfd of its reaper."""
    home = None
    if house.namespaces:
        home = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        sys_.unshare(sys_.NEWPID)  # for the next child, not for this process
    pid = os.fork()
    if pid == 0:
        try:
            reaper.main(house, request, fds)
        except BaseException:
            Channel(socket.socket(fileno=fds[0])).send({"error": traceback.format_exc()[-2000:]})
        finally:
            os._exit(71)
    pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    if home is not None:
        sys_.setns(home, sys_.NEWPID)
        os.close(home)
    return pid, pidfd


def check(house: House, request: dict[str, Any]) -> str:
    """Starts a session that ends at once; what went wrong, or nothing."""
    lease, far = Channel.pair()
    try:
        pid, pidfd = start(house, {**request, "personality": "nothing"}, [far.fileno()])
    except OSError as error:
        return str(error)
    finally:
        far.close()
    if pidfd is not None:
        os.close(pidfd)
    while (message := lease.receive()[0]) is not None:
        if "ready" in message or "error" in message:
            break
    lease.close()
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    return "the session died" if message is None else str(message.get("error", ""))


def serve(house: House, control: Channel) -> None:
    """Starts sessions until the trainer is gone."""
    watched = [control, *([] if house.trainer is None else [house.trainer])]
    while True:
        if not control.pending() and control not in poll(watched, None):
            return
        request, fds = control.receive(fds=16)
        if request is None:
            return
        try:
            pid, pidfd = start(house, request, fds)
            lease = Channel(socket.socket(fileno=os.dup(fds[0])))
            lease.send({"pid": pid}, [] if pidfd is None else [pidfd])
            lease.close()
            if pidfd is not None:
                os.close(pidfd)
        except OSError as error:
            Channel(socket.socket(fileno=os.dup(fds[0]))).send({"error": str(error)})
        for fd in fds:
            os.close(fd)


def main() -> None:
    """`zygote FD`: the control socket, over which the trainer first sends what `House` needs and its own pidfd."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    control.sock.set_inheritable(False)
    spec, fds = control.receive(fds=1)
    if spec is None:
        return
    house = House(**spec["house"], trainer=fds[0] if fds else None)
    try:
        failed = check(house, spec["probe"])
        control.send({"checked": not failed, "why": failed})
        if not failed and not spec["only_check"]:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            warm.warm(spec["packages"], house.base)
            sys_.prctl(sys_.PR_SET_DUMPABLE, 0)
            control.send({"ready": True, "threads": len(os.listdir("/proc/self/task"))})
            serve(house, control)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    finally:
        if not house.namespaces:  # the reapers clean up first
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.waitpid(-1, 0)
        shutil.rmtree(house.base, ignore_errors=True)
    os._exit(0)
