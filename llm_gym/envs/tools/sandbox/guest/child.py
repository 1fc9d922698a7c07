"""The session's own process: confined, then one of the personalities."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from . import confine
from . import syscalls as sys_
from .reaper import READY
from .warm import Personality


@dataclass(frozen=True)
class House:
    """What every session of a sandbox shares."""

    namespaces: bool
    """Each session gets pid, mount, network, ipc and host name namespaces of its own."""
    user_namespaces: bool
    """... a user namespace, because the zygote is not the machine's root; in a reduced tier, too, where that may be."""
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


def main(
    house: House,
    personalities: dict[str, Personality],
    request: dict[str, Any],
    fds: list[int],
    ready: int,
    make_room: Callable[[], str],
    spare: list[int],
) -> NoReturn:
    """Becomes the session.

    Args:
        house: what it shares with others.
        personalities: those that are warm; none where it is only tried whether a session can be started.
        request: what the trainer asked for.
        fds: the descriptors that its personality needs.
        ready: written to once the personality can take its first cell.
        make_room: makes the scratch folder, and in a full tier the namespaces (see `room`); `settle` is done then.
        spare: pids that it must not signal, where it sees them.
    """
    code = 70
    try:
        scratch = make_room()
        prepare({*fds, ready}, scratch)
        give_up(house, request, scratch, spare)
        if request["personality"] == "nothing":
            tell_ready(ready)
        else:
            personalities[request["personality"]](request, fds, lambda: tell_ready(ready))
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        tell(ready, traceback.format_exc()[-2000:].encode("utf-8", "replace"))
    finally:
        os._exit(code)


def tell_ready(ready: int) -> None:
    """Lets the reaper know, and closes `ready`, which no cell must find."""
    tell(ready, READY + str(os.getpid()).encode())
    os.close(ready)


def tell(ready: int, text: bytes) -> None:
    """Writes what the reaper waits for, if it still does."""
    with contextlib.suppress(BrokenPipeError):
        os.write(ready, text)


def settle(house: House, scratch: str) -> None:
    """What is the same for every session in `scratch`: a clean environment. A template does it once, before it forks.

    Every page that a session writes to first has to be copied, so what is done here instead of in
    `prepare` costs a session nothing.
    """
    os.umask(0o077)
    work = os.path.join(scratch, "work")
    os.environ.clear()
    os.environ.update(
        HOME=work,
        TMPDIR=scratch,
        PATH=f"{os.path.dirname(sys.executable)}:/usr/local/bin:/usr/bin:/bin",  # `python` is this one
        LANG="C.UTF-8",
        IPYTHONDIR=os.path.join(scratch, ".ipython"),
        MPLCONFIGDIR=os.path.join(scratch, ".matplotlib"),
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        OPENBLAS_NUM_THREADS="1",
        OMP_NUM_THREADS="1",
        PYTHONPATH=os.pathsep.join(house.path),
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONHASHSEED="0",
        # breakpoint() would ask for a person.
        PYTHONBREAKPOINT="0",
        PAGER="cat",
        GIT_PAGER="cat",
        TERM="dumb",
        SHELL=shutil.which("bash", path=os.defpath) or "/bin/sh",
    )
    if house.seccomp:  # there is no network: pip would try for long
        os.environ.update(PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_CACHE_DIR="1")
    tempfile.tempdir = None
    sys.argv = [""]


def prepare(keep: set[int], scratch: str) -> None:
    """A session id, closed descriptors, fresh random numbers."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    sys_.close_others(keep)
    os.chdir(os.path.join(scratch, "work"))
    random.seed()
    if "numpy" in sys.modules:
        # A number, because without one numpy makes objects first, on a hundred pages more.
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def give_up(house: House, request: dict[str, Any], scratch: str, spare: list[int]) -> None:
    """Everything that confines this process and its children, in the order in which it still can.

    A template without user namespaces has dropped the bounding set already; a new user namespace has a full one.
    """
    uid, keep = request["uid"], confine.CAP_DAC_READ_SEARCH if request["keep_read"] else None
    limits: dict[str, int] = request["limits"]
    if house.user_namespaces:
        sys_.prctl(sys_.PR_SET_DUMPABLE, 1)  # else its maps are root's to write
        confine.own_user_namespace()
    else:
        limits = {**limits, "NPROC": limits["NPROC"] + request["others"]}
    confine.limit(limits)
    if house.user_namespaces or (uid is not None and not house.namespaces):
        confine.drop_bounding_set(keep)
    if uid is not None:
        confine.become(uid)
    if house.namespaces or house.user_namespaces or uid is not None:
        confine.drop_capabilities(keep)
    if house.landlock:
        confine.landlock([*confine.readable(house.readable, house.hidden), *confine.own_proc()], [scratch])
    if house.seccomp:
        confine.seccomp(network=house.namespaces, spare=() if house.namespaces else spare)
    # Changing identity made /proc/self unreadable.
    sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
    if not house.namespaces:  # should somebody kill the reaper; changing identity forgets it, too
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
