"""Where a session lives: namespaces of its own in a full tier, a folder of its own in a reduced one."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import tempfile

from . import syscalls as sys_

_LOOPBACK_UP = struct.pack("16sH14x", b"lo", 1)
"""For SIOCSIFFLAGS."""


def isolate(disk: int, uid: int | None) -> str:
    """Namespaces of its own: private mounts, a bounded tmpfs at /tmp, a fresh /proc, only loopback. The scratch."""
    sys_.unshare(sys_.NEWNS | sys_.NEWIPC | sys_.NEWUTS | sys_.NEWNET)
    sys_.mount("none", "/", None, sys_.REC | sys_.PRIVATE)
    options = f"size={disk},nr_inodes={max(1024, disk // 4096)},mode=1777"
    sys_.mount("tmpfs", "/tmp", "tmpfs", sys_.NOSUID | sys_.NODEV, options)
    sys_.mount("proc", "/proc", "proc", sys_.NOSUID | sys_.NODEV | sys_.NOEXEC)
    socket.sethostname("sandbox")
    any_socket = socket.SocketType(socket.AF_INET, socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket.fileno(), 0x8914, _LOOPBACK_UP)
    any_socket.close()
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
