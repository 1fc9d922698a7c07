"""How a reduced tier starts a session: the zygote itself is warm, and a reaper forked from it forks the session.

Without a pid namespace the reaper has to be the session's parent: it becomes the subreaper of all
descendants and hunts them down itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import time
import traceback
from typing import Any

from . import child, confine, room, semaphores, warm
from . import syscalls as sys_
from .reaper import INTERRUPTED, told
from .wire import Channel, poll


class Reduced:
    """Sessions without namespaces, but perhaps of users: then each has its own count of processes."""

    def __init__(self, house: dict[str, Any], trainer: list[int]) -> None:
        alone = house["landlock"] and os.geteuid() != 0 and confine.may_have_user_namespace()
        self.house, self.watched = child.House(**{**house, "user_namespaces": alone}), list[Any](trainer)
        self.personalities: dict[str, warm.Personality] = {}

    def start(self, request: bytes, fds: list[int]) -> tuple[int, int | None]:
        """Forks the reaper."""
        pid = os.fork()
        if pid == 0:
            try:
                reap(self.house, self.personalities, json.loads(request), fds, self.watched)
            except BaseException:
                Channel(socket.socket(fileno=fds[0])).send({"error": traceback.format_exc()[-2000:]})
            finally:
                os._exit(71)
        return pid, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None

    def warm(self, packages: list[str]) -> int:
        """Warms this process, of which every session is a copy."""
        self.personalities = warm.warm(packages, self.house.base)
        sys_.top()
        sys_.prctl(sys_.PR_SET_DUMPABLE, 0)
        return len(os.listdir("/proc/self/task"))

    def end(self) -> None:
        """Waits for the reapers, who clean up, and removes the scratch folders."""
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        shutil.rmtree(self.house.base, ignore_errors=True)


def reap(
    house: child.House,
    personalities: dict[str, warm.Personality],
    request: dict[str, Any],
    fds: list[int],
    trainer: list[int],
) -> None:
    """The reaper: runs one session to its end; does not return."""
    gc.disable()
    sys_.close_others({*fds, *trainer})
    lease = Channel(socket.socket(fileno=fds[0]))
    scratch = room.share(house.base, request["uid"])
    zygote = os.getppid()
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGCHLD)  # so that `watch` wakes up
    wakeup, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ready, tell = os.pipe()
    spare = [zygote, os.getpid(), request["trainer_pid"]]
    pid = os.fork()
    if pid == 0:
        os.close(ready)
        child.main(house, personalities, request, fds[1:], tell, lambda: undo(house, scratch), spare)
    try:
        sys_.prctl(sys_.PR_SET_DUMPABLE, 0)
        for fd in (*fds[1:], tell):
            os.close(fd)
        watch(pid, zygote, lease, ready, wakeup, trainer)
    finally:  # whatever happened: nobody else would end the session
        hunt(request["uid"])
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(0)


def undo(house: child.House, scratch: str) -> str:
    """What the reaper did to itself is not for its child."""
    gc.enable()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    child.settle(house, scratch)
    if house.landlock:
        semaphores.install(scratch)
    return scratch


def watch(pid: int, zygote: int, lease: Channel, ready: int, wakeup: int, trainer: list[int]) -> None:
    """Until the session ends, or its lease, the zygote, or the trainer."""
    watched = [lease, ready, wakeup, *trainer]
    while True:
        for event in poll(watched, None):
            if event == ready:
                watched.remove(ready)
                with contextlib.suppress(ConnectionError):  # the trainer may just have died
                    os.write(lease.fileno(), told(os.read(ready, 4096)))
            elif event == wakeup:
                _drain(wakeup)
                if pid in _reap() or os.getppid() != zygote:
                    return
            elif event is lease:
                message, _ = lease.receive()
                if message is None:
                    return
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGINT)
                with contextlib.suppress(ConnectionError):
                    os.write(lease.fileno(), INTERRUPTED)
            else:
                return


def _drain(wakeup: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(wakeup, 4096)


def _reap() -> list[int]:
    found: list[int] = []
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitpid(-1, os.WNOHANG)[0]:
            found.append(ended)
    return found


def hunt(uid: int | None) -> None:
    """Kills every descendant: stop them first so that none can fork away, then kill; repeat until none is left."""
    if uid is not None:
        with contextlib.suppress(OSError):  # no process to be had, perhaps because of theirs
            _kill_all_of(uid)
    while True:
        family = _descendants(os.getpid())
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in family:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill_all_of(uid: int) -> None:
    helper = os.fork()
    if helper == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(helper, 0)


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            parent = int(file.read().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found
