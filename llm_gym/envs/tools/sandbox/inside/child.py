"""The session's own process: confined, then one of the personalities."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import random
import signal
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from . import confine
from . import syscalls as sys_

if TYPE_CHECKING:
    from .zygote import House

PERSONALITIES = {"worker": "worker", "kernel": "kernel"}


def main(house: House, request: dict[str, Any], fds: list[int], ready: int, scratch: str, spare: list[int]) -> NoReturn:
    """Becomes the session. `ready` is written to once the personality can take its first cell."""
    code = 70
    try:
        prepare(house, request, {*fds, ready}, scratch)
        give_up(house, request, scratch, spare)
        if request["personality"] == "nothing":
            os.write(ready, b"R")
        else:
            module = importlib.import_module("." + PERSONALITIES[request["personality"]], __package__)
            module.main(request, fds, lambda: _tell(ready))
        code = 0
    except SystemExit:
        code = 0
    except BaseException:
        os.write(ready, traceback.format_exc()[-2000:].encode("utf-8", "replace"))
    finally:
        os._exit(code)


def _tell(ready: int) -> None:
    os.write(ready, b"R")
    os.close(ready)


def prepare(house: House, request: dict[str, Any], keep: set[int], scratch: str) -> None:
    """A session id, closed descriptors, a clean environment, fresh random numbers."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    close_others(keep)
    work = os.path.join(scratch, "work")
    os.chdir(work)
    os.umask(0o077)
    os.environ.clear()
    os.environ.update(
        HOME=work,
        TMPDIR=scratch,
        PATH="/usr/local/bin:/usr/bin:/bin",
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
    )
    tempfile.tempdir = None
    gc.enable()  # the reaper, whose fork this is, had switched it off
    sys.argv = [""]
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def close_others(keep: set[int]) -> None:
    """Closes every descriptor above 2 but those in `keep`."""
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))


def give_up(house: House, request: dict[str, Any], scratch: str, spare: list[int]) -> None:
    """Everything that confines this process and its children, in the order in which it still can."""
    uid, keep = request["uid"], confine.CAP_DAC_READ_SEARCH if request["keep_read"] else None
    if house.user_namespaces:
        confine.own_user_namespace()
    confine.limit(request["limits"])
    if house.namespaces or uid is not None:
        confine.drop_bounding_set(keep)
    if uid is not None:
        confine.become(uid)
    if house.namespaces or uid is not None:
        confine.drop_capabilities(keep)
    if house.landlock:
        rules = [*confine.readable(house.readable, house.hidden), ("/proc", confine.READ_FILE | confine.READ_DIR)]
        confine.landlock(rules, [scratch])
    if house.seccomp:
        confine.seccomp(network=house.namespaces, spare=() if house.namespaces else spare)
    # Changing identity made /proc/self unreadable.
    sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
