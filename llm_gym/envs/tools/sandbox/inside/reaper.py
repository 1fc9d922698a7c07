"""The first process of a session: it isolates, forks the session proper, relays interrupts, and cleans up.

In a pid namespace of its own it is pid 1: when it ends, the kernel ends all others. Elsewhere it is
their subreaper and hunts them down itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
from typing import TYPE_CHECKING, Any

from . import child
from . import syscalls as sys_
from .wire import Channel, poll

if TYPE_CHECKING:
    from .zygote import House


def main(house: House, request: dict[str, Any], fds: list[int]) -> None:
    """Runs one session to its end; does not return."""
    gc.disable()
    child.close_others({*fds, *([] if house.namespaces or house.trainer is None else [house.trainer])})
    lease = Channel(socket.socket(fileno=fds[0]))
    scratch = isolate(request["disk"], request["uid"]) if house.namespaces else share(house.base, request["uid"])
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
        child.main(house, request, fds[1:], tell, scratch, spare)
    sys_.prctl(sys_.PR_SET_DUMPABLE, 0)
    for fd in (*fds[1:], tell):
        os.close(fd)
    others = [] if house.namespaces or house.trainer is None else [house.trainer]
    status = watch(pid, zygote, lease, ready, wakeup, others)
    if not house.namespaces:
        hunt(request["uid"])
        shutil.rmtree(scratch, ignore_errors=True)
    lease.send({"exit": status})
    os._exit(0)


def watch(pid: int, zygote: int, lease: Channel, ready: int, wakeup: int, others: list[int]) -> int | None:
    """Until the session ends, or its lease, the zygote, or one of `others`: its wait status, None if it still runs."""
    watched = [lease, ready, wakeup, *others]
    while True:
        for event in poll(watched, None):
            if event == ready:
                text = os.read(ready, 4096)
                watched.remove(ready)
                lease.send({"ready": True} if text == b"R" else {"error": text.decode("utf-8", "replace")})
            elif event == wakeup:
                _drain(wakeup)
                for ended, status in _reap():
                    if ended == pid:
                        return status
                if os.getppid() != zygote:
                    return None
            elif event is lease:
                message, _ = lease.receive()
                if message is None:
                    return None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGINT)
            else:
                return None


def _drain(wakeup: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(wakeup, 4096)


def _reap() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def isolate(disk: int, uid: int | None) -> str:
    """Namespaces of its own: private mounts, a bounded tmpfs at /tmp, a fresh /proc, only loopback. The scratch."""
    sys_.unshare(sys_.NEWNS | sys_.NEWIPC | sys_.NEWUTS | sys_.NEWNET)
    sys_.mount("none", "/", None, sys_.REC | sys_.PRIVATE)
    options = f"size={disk},nr_inodes={max(1024, disk // 4096)},mode=1777"
    sys_.mount("tmpfs", "/tmp", "tmpfs", sys_.NOSUID | sys_.NODEV, options)
    sys_.mount("proc", "/proc", "proc", sys_.NOSUID | sys_.NODEV | sys_.NOEXEC)
    socket.sethostname("sandbox")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS: up
    return _folders("/tmp", uid)


def share(base: str, uid: int | None) -> str:
    """No namespaces: a scratch folder of its own on the shared disk, and every orphan becomes our child."""
    sys_.prctl(sys_.PR_SET_CHILD_SUBREAPER, 1)
    scratch = tempfile.mkdtemp(dir=base)
    if uid is not None:
        os.chmod(base, 0o711)
    return _folders(scratch, uid)


def _folders(scratch: str, uid: int | None) -> str:
    work = os.path.join(scratch, "work")
    os.mkdir(work, 0o700)
    if uid is not None:
        os.chown(work, uid, uid)
        if scratch != "/tmp":
            os.chown(scratch, uid, uid)
    return scratch


def hunt(uid: int | None) -> None:
    """Kills every descendant: stop them first so that none can fork away, then kill; repeat until none is left."""
    if uid is not None:
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
