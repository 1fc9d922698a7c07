"""The kinds of isolation, best first; which of them this machine allows; how each is started."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GUEST = Path(__file__).parent / "guest"
PACKAGE = Path(__file__).parents[3]
MOUNTED = "/opt/sandbox"
"""Where the code of `GUEST` is seen in a sandbox with its own file tree."""

DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = (("/proc/self/fd", "/dev/fd"), ("/proc/self/fd/0", "/dev/stdin"), ("/proc/self/fd/1", "/dev/stdout"))


@dataclass(frozen=True)
class Tier:
    """One kind of isolation, as this machine offers it."""

    name: str
    """`bubblewrap`, `namespaces`, `landlock` or `none`."""
    isolation: str
    """`full`, `reduced` or `none`."""
    why: str
    """One sentence: what is missing, or that nothing is."""


FULL = "every session has its own processes, files, network and user identity"
TIERS: dict[str, Tier] = {
    "bubblewrap": Tier("bubblewrap", "full", f"bubblewrap: {FULL}."),
    "namespaces": Tier("namespaces", "full", f"Linux namespaces: {FULL}."),
    "landlock": Tier(
        "landlock",
        "reduced",
        "Landlock, seccomp and rlimits: no network and no foreign files, but the names of other processes are "
        "visible, the scratch folder has no size limit, and the memory of all sessions together is not bounded.",
    ),
    "none": Tier(
        "none",
        "none",
        "rlimits only: model-written code can read every file of this user, reach the network and kill the trainer.",
    ),
}


def interpreter() -> str:
    """The real interpreter: not the link in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def packages() -> list[str]:
    """Where this interpreter finds installed packages: all that a session can import besides the standard library.

    Of `sys.path`, which virtual environments and .pth files build up in layers, only the folders that packages are
    installed into: what a project has put there besides (its own folder, for one) is none of a session's business.
    """
    own = [os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    found = dict.fromkeys([*map(os.path.realpath, filter(None, sys.path)), *own])
    return [path for path in found if os.path.isdir(path) and (path in own or _holds_packages(path))]


def _holds_packages(folder: str) -> bool:
    if os.path.basename(folder) in ("site-packages", "dist-packages"):
        return True
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder))  # pip install --target
    except OSError:
        return False


def visible() -> list[str]:
    """The folders and files that a session may read, none of which contains another."""
    system = ["/usr", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"]
    system += [p for p in ("/bin", "/sbin", "/lib", "/lib64") if os.path.isdir(p) and not os.path.islink(p)]
    wanted = [*system, os.path.realpath(sys.base_prefix), *packages()]
    found: list[str] = []
    for path in sorted(p for p in dict.fromkeys(wanted) if os.path.exists(p)):
        if not any(_within(path, other) for other in found):
            found.append(path)
    return found


def hidden() -> list[str]:
    """What lies in `visible` and is yet none of a session's business: this package (its data sets, its graders)."""
    return [str(PACKAGE)] if any(_within(str(PACKAGE), path) for path in visible()) else []


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def seen(path: str) -> str:
    """Where a path is seen in a sandbox with its own file tree: elsewhere if the scratch folder would cover it."""
    covered = any(_within(path, folder) for folder in ("/tmp", "/dev"))
    return f"{MOUNTED}/covered{path}" if covered else path


def mounts() -> list[list[str]]:
    """The file tree of a sandbox, as [kind, source, target]; see `guest.outer.build`."""
    links = [p for p in ("/bin", "/sbin", "/lib", "/lib64") if os.path.islink(p)]
    rows = [["link", os.readlink(p), p] for p in links]
    rows += [["bind", p, seen(p)] for p in visible()]
    rows += [["tmpfs", "0755", seen(p)] for p in hidden()]
    rows += [["bind", str(GUEST), f"{MOUNTED}/guest"], ["proc", "", "/proc"]]
    rows += [["device", f"/dev/{name}", f"/dev/{name}"] for name in DEVICES]
    rows += [["link", source, target] for source, target in (*LINKS, ("/tmp", "/dev/shm"))]
    return [*rows, ["tmpfs", "1777", "/tmp"]]


def bubblewrap_arguments(user: bool) -> list[str]:
    """The command line of bwrap for the same tree."""
    # As pid 1 the zygote needs no helper, and ends everything when it ends.
    arguments = [shutil.which("bwrap") or "bwrap", "--as-pid-1", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    arguments += ["--unshare-net", *(["--unshare-user", "--uid", "0", "--gid", "0"] if user else [])]
    for capability in ("SYS_ADMIN", "NET_ADMIN", "SETUID", "SETGID", "SETPCAP", "SETFCAP", "CHOWN", "KILL"):
        arguments += ["--cap-add", f"CAP_{capability}"]
    made: set[str] = set()
    bound = {seen(path) for path in visible()}
    for kind, source, target in mounts():
        for parent in reversed(Path(target).parents[:-1]):  # bwrap would make them with mode 0700
            if str(parent) not in made and not any(_within(str(parent), m) for m in made & bound):
                arguments += ["--perms", "0755", "--dir", str(parent)]
        made |= {target, *(str(p) for p in Path(target).parents)}
        arguments += _BWRAP[kind](source, target)
    return [*arguments, "--clearenv", "--chdir", "/"]


_BWRAP: dict[str, Callable[[str, str], list[str]]] = {
    "bind": lambda source, target: ["--ro-bind", source, target],
    "device": lambda source, target: ["--dev-bind", source, target],
    "tmpfs": lambda mode, target: ["--perms", mode, "--tmpfs", target],
    "proc": lambda _, target: ["--proc", target],
    "link": lambda source, target: ["--symlink", source, target],
}


def own_uid(other: int) -> bool:
    """Whether the user `other`, who has no rights here, can read the interpreter and its packages."""
    for path in (interpreter(), *packages()):
        for part in (Path(path), *Path(path).parents):
            if not part.stat().st_mode & (0o001 if part.is_dir() else 0o004):
                return False
    return other > 0
