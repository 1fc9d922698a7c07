"""The Linux system calls that Python does not offer: one table of numbers, one thin function each."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys

MACHINES = {"x86_64": 0, "aarch64": 1}
MACHINE = os.uname().machine
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name -> its number on (x86_64, aarch64); None where the machine has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}

NEWNS, NEWUTS, NEWIPC, NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEWPID, NEWNET = 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, BIND, REC, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 8, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47

libc = ctypes.CDLL(None, use_errno=True)


def number(name: str) -> int | None:
    """The number of the call on this machine; None where it has none."""
    return NUMBERS[name][MACHINES[MACHINE]] if MACHINE in MACHINES and sys.platform == "linux" else None


def checked(result: int, what: str) -> int:
    """`result`, or the OSError that a negative one stands for."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(name: str, *args: object) -> int:
    """The system call by name; raises OSError."""
    code = number(name)
    if code is None:
        raise OSError(38, f"{name}: not on {MACHINE}")
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    return checked(int(libc.syscall(ctypes.c_long(code), *values)), name)


def unshare(flags: int) -> None:
    """New namespaces for this process (for its children, where NEWPID is concerned)."""
    checked(libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Joins the namespace that `fd` names."""
    checked(libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    given = [source.encode(), target.encode(), kind.encode() if kind else None]
    checked(libc.mount(*given, ctypes.c_ulong(flags), data.encode() or None), f"mount {kind or 'bind'} on {target}")


def read_only(target: str) -> None:
    """Makes the mount and all below it read-only, without setuid programs or devices."""
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    syscall("mount_setattr", -100, ctypes.c_char_p(target.encode()), 0x8000, attributes, ctypes.sizeof(attributes))


def prctl(option: int, *args: int, check: bool = False) -> int:
    """prctl(2); an error is raised only with `check`."""
    values = [ctypes.c_ulong(a) for a in (*args, 0, 0, 0, 0)[:4]]
    result = int(libc.prctl(option, *values))
    return checked(result, f"prctl({option})") if check else result


def send_signal(pidfd: int, number_: int) -> None:
    """Signals the process that `pidfd` holds; nothing happens if it is gone."""
    import signal

    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number_)


def close_others(keep: set[int]) -> None:
    """Closes every descriptor above 2 but those in `keep`."""
    low = 3
    for fd in (*sorted(keep), top()):
        os.closerange(low, fd)
        low = max(low, fd + 1)


@functools.cache
def top() -> int:
    """Above every descriptor of this process; asked before a fork, also above those of its children.

    New descriptors get the lowest free numbers, so it stays true until 64 more than now are open at once.
    """
    return max(map(int, os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))) + 64
