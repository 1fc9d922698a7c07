"""Builds the sandbox by hand where bubblewrap is missing: namespaces, a new root, then the zygote as pid 1."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from . import confine
from . import syscalls as sys_

ROOT = "/tmp"
"""Where the new root is put together; inside the new mount namespace only."""


def build(mounts: list[list[str]]) -> None:
    """Makes the file tree of `mounts` the root, and lets go of the old one.

    Each is [kind, source, target]: `bind` (read-only), `device`, `tmpfs`, `proc`, `link`.
    """
    os.umask(0o022)
    sys_.mount("none", "/", None, sys_.REC | sys_.PRIVATE)
    sources = {source: os.open(source, os.O_PATH) for kind, source, _ in mounts if kind in ("bind", "device")}
    sys_.mount("tmpfs", ROOT, "tmpfs", sys_.NOSUID | sys_.NODEV, "mode=0755,size=1m")
    for kind, source, target in mounts:
        where = ROOT + target
        os.makedirs(os.path.dirname(where), exist_ok=True)
        _KINDS[kind](f"/proc/self/fd/{sources[source]}" if source in sources else source, where)
    os.chdir(ROOT)
    sys_.mount("tmpfs", ROOT, None, 32 | sys_.BIND | sys_.RDONLY | sys_.NOSUID | sys_.NODEV)
    here = ctypes.c_char_p(b".")
    sys_.syscall("pivot_root", here, here)
    sys_.checked(sys_.libc.umount2(b".", sys_.DETACH), "umount of the old root")
    os.chdir("/")
    for fd in sources.values():
        os.close(fd)


def _bind(source: str, where: str) -> None:
    if os.path.isdir(source):
        os.makedirs(where, exist_ok=True)
    else:
        os.close(os.open(where, os.O_CREAT | os.O_WRONLY, 0o644))
    sys_.mount(source, where, None, sys_.BIND | sys_.REC)
    sys_.read_only(where)


def _device(source: str, where: str) -> None:
    os.close(os.open(where, os.O_CREAT | os.O_WRONLY, 0o666))
    sys_.mount(source, where, None, sys_.BIND)


def _tmpfs(mode: str, where: str) -> None:
    os.makedirs(where, exist_ok=True)
    sys_.mount("tmpfs", where, "tmpfs", sys_.NOSUID | sys_.NODEV, f"mode={mode},size=1m")


def _proc(_: str, where: str) -> None:
    os.makedirs(where, exist_ok=True)
    sys_.mount("proc", where, "proc", sys_.NOSUID | sys_.NODEV | sys_.NOEXEC)


_KINDS: dict[str, Callable[[str, str], None]] = {
    "bind": _bind,
    "device": _device,
    "tmpfs": _tmpfs,
    "proc": _proc,
    "link": os.symlink,
}


def enter(user: bool) -> None:
    """Unshares everything; returns in the first process of the new pid namespace, which dies with this one."""
    if user:
        uid, gid = os.geteuid(), os.getegid()
        sys_.unshare(sys_.NEWUSER)
        confine.map_ids(0, uid, 0, gid)
    sys_.unshare(sys_.NEWNS | sys_.NEWPID | sys_.NEWIPC | sys_.NEWUTS | sys_.NEWNET)
    child = os.fork()
    if child:
        os.closerange(3, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL, check=True)


def main() -> None:
    """`outer.py SPEC`: SPEC is JSON with `user`, `mounts`, `command` and `environment`."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    enter(spec["user"])
    build(spec["mounts"])
    os.execve(spec["command"][0], spec["command"], spec["environment"])
