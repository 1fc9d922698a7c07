"""Imports everything before the first fork, so that no session has to."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

Personality = Callable[[dict[str, Any], list[int], Callable[[], object]], None]
"""Serves a session: what was asked for, its descriptors, and what it calls once it takes cells."""
_LAZY = (
    "asyncio bdb cmd code collections concurrent.futures.thread ctypes datetime decimal fractions hashlib heapq "
    "inspect itertools json linecache math multiprocessing multiprocessing.context multiprocessing.popen_fork pdb "
    "queue random re sqlite3 statistics string subprocess tempfile timeit tokenize traceback typing uuid "
    "IPython.core.completerlib IPython.core.debugger IPython.core.displayhook IPython.core.magics "
    "IPython.core.profiledir IPython.core.ultratb IPython.utils.io ipykernel.debugger "
    "tornado.gen tornado.locks tornado.platform.asyncio tornado.queues"
).split()
_HUGE, _MADV_COLLAPSE = 2 << 20, 25


def warm(packages: list[str], folder: str) -> dict[str, Personality]:
    """Imports, makes the worker's shell and lets it run a few cells; then freezes what is there.

    Returns the personalities by name. Nobody finds them by import any more, nor what else is in this package: cells
    look through `sys.modules` (`%autoreload` does), and this is none of their business.
    """
    os.environ["IPYTHONDIR"] = os.path.join(folder, ".ipython")
    sys.modules["debugpy"] = None  # type: ignore[assignment]  # ipykernel would start it
    for name in (*_LAZY, *packages):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from . import kernel, worker

    # The folder of this package is none of the session's business; '' stands for its working folder.
    sys.path.remove(os.environ["PYTHONPATH"].split(os.pathsep)[0])

    shell = worker.make_shell()
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        for cell in ("x = 1\nprint(x)\nx", "1/0", "def f(:"):
            shell.run_cell(cell)  # type: ignore[no-untyped-call]
    shell.reset(new_session=True)  # type: ignore[no-untyped-call]
    shell.execution_count = 1
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    if os.path.exists("/proc/self/maps"):
        collapse()
    return {"worker": worker.main, "kernel": kernel.main}


def collapse() -> None:
    """Puts what is warm into huge pages, where the system can: there is less for every fork to copy."""
    madvise = ctypes.CDLL(None).madvise
    with open("/proc/self/maps") as file:
        for line in file:
            place, rights, _, _, _, *name = line.split()
            if rights == "rw-p" and (not name or name[0] == "[heap]"):
                start, end = (int(x, 16) for x in place.split("-"))
                for at in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
                    madvise(ctypes.c_void_p(at), ctypes.c_size_t(_HUGE), _MADV_COLLAPSE)
