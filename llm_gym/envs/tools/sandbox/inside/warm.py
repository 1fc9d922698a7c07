"""Imports everything before the first fork, so that no session has to."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import sys

_LAZY = (
    "asyncio bdb cmd code collections concurrent.futures.thread ctypes datetime decimal fractions hashlib heapq "
    "inspect itertools json linecache math multiprocessing multiprocessing.context multiprocessing.popen_fork pdb "
    "queue random re sqlite3 statistics string subprocess tempfile timeit tokenize traceback typing uuid "
    "IPython.core.completerlib IPython.core.debugger IPython.core.displayhook IPython.core.magics "
    "IPython.core.profiledir IPython.core.ultratb IPython.utils.io ipykernel.debugger "
    "tornado.gen tornado.locks tornado.platform.asyncio tornado.queues"
).split()


def warm(packages: list[str], folder: str) -> None:
    """Imports, makes the worker's shell and lets it run a few cells; then freezes what is there."""
    os.environ["IPYTHONDIR"] = os.path.join(folder, ".ipython")
    sys.modules["debugpy"] = None  # type: ignore[assignment]  # ipykernel would start it
    for name in (*_LAZY, *packages):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from . import kernel, worker  # noqa: F401

    # The folder of this package is none of the session's business; '' stands for its working folder.
    sys.path.remove(os.environ["PYTHONPATH"].split(os.pathsep)[0])

    shell = worker.make_shell()
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        for cell in ("x = 1\nprint(x)\nx", "1/0", "def f(:"):
            shell.run_cell(cell)  # type: ignore[no-untyped-call]
    shell.reset(new_session=True)  # type: ignore[no-untyped-call]
    shell.execution_count = 1
    gc.collect()
    gc.freeze()
