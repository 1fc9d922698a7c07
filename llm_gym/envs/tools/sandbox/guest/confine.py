"""What a session's process gives up before the first cell: capabilities, identity, files, system calls."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import struct
from collections.abc import Iterable

from . import syscalls as sys_

# Calls that a Python session has no business with. EPERM.
DENIED = (
    "acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module finit_module fsconfig fsmount fsopen "
    "fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load "
    "keyctl lookup_dcookie memfd_create memfd_secret mount mount_setattr move_mount msgget name_to_handle_at "
    "nfsservctl open_by_handle_at open_tree perf_event_open personality pidfd_getfd pivot_root process_vm_readv "
    "process_vm_writev ptrace quotactl reboot request_key setdomainname sethostname setns settimeofday shmget "
    "swapoff swapon syslog umount2 unshare userfaultfd vhangup"
).split()
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open")
NEW_NAMESPACE = 0x7E020000
TIOCSTI = 0x5412
AF_UNIX, STREAM_MASK = 1, 0xF
CAP_DAC_READ_SEARCH = 2

_LOAD, _EQUAL, _SET, _ABOVE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x50000
_EPERM, _ENOSYS, _EOPNOTSUPP = _ERRNO | 1, _ERRNO | 38, _ERRNO | 95
Instruction = tuple[int, int, int, int]


def _case(name: str, *body: Instruction) -> list[Instruction]:
    """`body` runs only for the call `name`; afterwards the call's number is loaded again."""
    number = sys_.number(name)
    return [] if number is None else [(_EQUAL, 0, len(body) + 1, number), *body, (_LOAD, 0, 0, 0)]


def _argument(index: int) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index)


def _lonely() -> list[Instruction]:
    """Without a network namespace: only Unix streams that nobody outside answers (no connect at all)."""
    return [
        *_case(
            "socket",
            _argument(0),
            (_EQUAL, 1, 0, AF_UNIX),
            (_RETURN, 0, 0, _EOPNOTSUPP),
            _argument(1),
            (0x54, 0, 0, STREAM_MASK),  # and: the type without its flags
            (_EQUAL, 1, 0, 1),
            (_RETURN, 0, 0, _EOPNOTSUPP),
        ),
        *_case("connect", (_RETURN, 0, 0, _EOPNOTSUPP)),
    ]


def _spare(pids: Iterable[int]) -> list[Instruction]:
    """Without a pid namespace: no signal to a group or to everybody, nor to the processes in `pids`."""
    found = _case("kill", _argument(0), (_ABOVE, 0, 1, 1 << 31), (_RETURN, 0, 0, _EPERM))
    for name in SIGNALS:
        for pid in pids:
            found += _case(name, _argument(0), (_EQUAL, 0, 1, pid), (_RETURN, 0, 0, _EPERM))
    return found


def seccomp(*, network: bool, spare: Iterable[int] = ()) -> None:
    """Installs the filter, for good and for all children.

    Args:
        network: the process has a network namespace of its own; otherwise sockets are refused here.
        spare: pids that must not be signalled; only needed where the process sees those of others.
    """
    program = seccomp_program(network, tuple(spare))
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))
    sys_.prctl(sys_.PR_SET_NO_NEW_PRIVS, 1, check=True)
    sys_.prctl(sys_.PR_SET_SECCOMP, 2, ctypes.addressof(header), check=True)


@functools.cache
def seccomp_program(network: bool, spare: tuple[int, ...]) -> bytes:
    """The filter of `seccomp`: 8 bytes an instruction."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, sys_.AUDIT_ARCH[sys_.MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if sys_.MACHINE == "x86_64":  # the x32 calls
        program += [(_ABOVE, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for name in DENIED:
        program += _case(name, (_RETURN, 0, 0, _EPERM))
    # clone3 hides its flags behind a pointer; glibc falls back to clone, whose flags can be read.
    program += _case("clone3", (_RETURN, 0, 0, _ENOSYS))
    program += _case("clone", _argument(0), (_SET, 0, 1, NEW_NAMESPACE), (_RETURN, 0, 0, _EPERM))
    program += _case("ioctl", _argument(1), (_EQUAL, 0, 1, TIOCSTI), (_RETURN, 0, 0, _EPERM))
    program += [] if network else _lonely()
    program += _spare(spare) if spare else []
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *i) for i in program)


READ_FILE, READ_DIR, EXECUTE, WRITE_FILE = 1 << 2, 1 << 3, 1 << 0, 1 << 1
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def landlock_abi() -> int:
    """The version of Landlock this kernel offers; 0 without."""
    try:
        return sys_.syscall("landlock_create_ruleset", None, 0, 1)
    except (OSError, KeyError):
        return 0


def landlock(rules: Iterable[tuple[str, int]], writable: Iterable[str]) -> None:
    """Restricts this process and its children to the files named.

    Args:
        rules: (path, rights), for what may be read.
        writable: folders in which everything is allowed.
    """
    abi = landlock_abi()
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    # Files; from ABI 4 on no TCP either; from 6 on no signals to, nor abstract sockets of, processes outside.
    fields = struct.pack("QQQ", files, 3, 3)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    ruleset = sys_.syscall("landlock_create_ruleset", ctypes.c_char_p(fields), len(fields), 0)
    for path, rights in (*rules, *((p, files) for p in writable), *((p, WRITE_FILE | READ_FILE) for p in _DEVICES)):
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = rights & files & (-1 if os.path.isdir(path) else _FILE_RIGHTS)
        sys_.syscall("landlock_add_rule", ruleset, 1, ctypes.c_char_p(struct.pack("=Qi", allowed, fd)), 0)
        os.close(fd)
    sys_.prctl(sys_.PR_SET_NO_NEW_PRIVS, 1, check=True)
    sys_.syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def readable(paths: Iterable[str], hidden: Iterable[str]) -> list[tuple[str, int]]:
    """Landlock rules that open `paths` except what lies under `hidden` (whose names stay visible).

    Landlock only adds rights downwards, so a folder above a hidden one is opened child by child.
    """
    hidden, rules = list(hidden), []
    for path in paths:
        if path in hidden:
            continue
        if any(h.startswith(path.rstrip("/") + "/") for h in hidden):
            rules.append((path, READ_DIR))
            rules += readable((os.path.join(path, name) for name in sorted(os.listdir(path))), hidden)
        else:
            rules.append((path, READ_FILE | READ_DIR | EXECUTE))
    return rules


def own_proc() -> list[tuple[str, int]]:
    """Landlock rules for /proc: what it says of the machine and of this process; of others only that they are there.

    The kernel forgets a folder of /proc that nobody uses, and makes another, for which the rule would not hold; so this
    process keeps its own open.
    """
    os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
    whole = [os.path.join("/proc", name) for name in os.listdir("/proc") if not name.isdigit()]
    return [("/proc", READ_DIR), *((path, READ_FILE | READ_DIR) for path in whole)]


def drop_capabilities(keep: int | None = None) -> None:
    """Gives up every capability for good, but `keep` (which children then inherit)."""
    sys_.prctl(sys_.PR_CAP_AMBIENT, 4)
    low = 0 if keep is None else 1 << keep
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    sys_.syscall("capset", header, ctypes.create_string_buffer(struct.pack("6I", low, low, low, 0, 0, 0)))
    if keep is not None:
        sys_.prctl(sys_.PR_CAP_AMBIENT, 2, keep, check=True)


def drop_bounding_set(keep: int | None = None) -> None:
    """No program started later gains a capability. Needs CAP_SETPCAP, so it comes before `become`."""
    for capability in range(64):
        if capability != keep and sys_.prctl(sys_.PR_CAPBSET_DROP, capability) < 0:
            return  # there are no more


def become(uid: int) -> None:
    """Takes an identity of its own; kept capabilities are dealt with afterwards."""
    sys_.prctl(sys_.PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def own_user_namespace() -> None:
    """A user namespace of this process alone, in which it is the ordinary user 1000, and its processes are counted."""
    uid, gid = os.geteuid(), os.getegid()
    sys_.unshare(sys_.NEWUSER)
    map_ids(1000, uid, 1000, gid)


def may_have_user_namespace() -> bool:
    """Whether a process of this user may have one of its own: tried in a child, for there is no way back."""
    child = os.fork()
    if child == 0:
        try:
            sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
            own_user_namespace()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def map_ids(uid: int, outer_uid: int, gid: int, outer_gid: int) -> None:
    """Writes the one-line maps of a new user namespace."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {outer_uid} 1"), ("gid_map", f"{gid} {outer_gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def limit(limits: dict[str, int]) -> None:
    """Hard limits by name (`AS`, `CPU`, ...), never above those already in force."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
