"""What both personalities' shells have in common: an IPython shell without a person, a terminal, files or a network.

A cell may do to its shell what it likes: `mend` puts back the methods that run cells.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import contextlib
import fnmatch
import importlib.machinery
import importlib.metadata
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.path import compress_user
from traitlets.config import Config

from .tracebacks import describe, safely

INSTALLERS = ("pip", "conda", "mamba", "micromamba", "uv")
"""Programs that are magics, too."""
INSTALL = re.compile(
    r"(^|[;&|\n(]\s*)((?:sudo\s+)?(?:\S*/)?(?:python[\d.]*\s+-m\s+)?"
    r"(?:pip[\d.]*|uv|(?:micro)?mamba|conda|poetry|npm|apt|apt-get|dnf|yum|brew)\s(?:[^;&|\n)]*?\s)?(?:install|add)\b"
    r"((?:>&|&>|[^;&|\n)])*))"
)
"""A command of a shell that installs something: what stands before it, itself, what is to be installed."""
KNOWN = "numpy scipy sympy pandas matplotlib networkx sklearn torch statsmodels mpmath requests PIL".split()
RUNNING = (
    "run_cell _run_cell run_cell_async should_run_async transform_cell run_ast_nodes run_code showtraceback "
    "showsyntaxerror _showtraceback"
).split()
"""Methods without which no cell runs, or says why it failed."""
SHALLOWEST = 1000
"""Of recursion limits: Python's own, which the shell itself may need."""


class Shelf(dict[str, Any]):
    """What IPython would keep in a folder: the directories that `%cd` has left, bookmarks, `%store`."""

    def keys(self, pattern: str = "*") -> Any:
        """The names, all of them or those of a pattern."""
        return fnmatch.filter(list(super().keys()), pattern)


def configuration() -> Config:
    """The settings of both shells."""
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.xmode = "Plain"
    return config


class Plain(InteractiveShell):
    """The shell that personalities are made from."""

    def furnish(self) -> None:
        """Once it is made: a shelf in memory, help in the output, magics that install nothing."""
        self.db: Any = Shelf()
        self.set_hook("show_in_pager", lambda self, data, start=0, screen_lines=0: print(_plain(data)), 0)
        for name in INSTALLERS:
            self.register_magic_function(_installer(self, name), "line", name)
        _methods.update({(kind, n): vars(kind)[n] for kind in type(self).__mro__ for n in RUNNING if n in vars(kind)})

    def enter(self) -> None:
        """Once it is in its working folder: `%cd` starts from there."""
        self.home_dir = os.getcwd()
        history: Any = self.history_manager
        history.dir_hist[:] = [Path.cwd()]

    def ask_exit(self) -> None:
        """What quit() and exit() do."""
        print("quit() is off here: the session goes on.")

    def catch_up(self) -> None:
        """What was written so far goes before what a child writes, and that before what comes after it."""

    def system(self, cmd: str) -> None:
        """`!cmd`: its output is the cell's. IPython would give it a terminal, of which there are none."""
        command = self.var_expand(cmd, depth=1)
        if "PIP_NO_INDEX" in os.environ:
            command = INSTALL.sub(lambda found: found[1] + answered(found[3]), command)
        self.catch_up()
        code = subprocess.call(command, shell=True, executable=os.environ.get("SHELL"))
        self.catch_up()
        self.user_ns["_exit_code"] = code  # a value returned would be displayed
        if code and getattr(self, "system_raise_on_error", False):
            raise subprocess.CalledProcessError(code, cmd)

    def showtraceback(
        self,
        exc_tuple: Any = None,
        filename: str | None = None,
        tb_offset: int | None = None,
        exception_only: bool = False,
        running_compiled_code: bool = False,
    ) -> None:
        """Short tracebacks; IPython's own for errors of syntax, and where a cell has asked for another form."""
        try:
            kind, value, trace = self._get_exc_info(exc_tuple)
            ours = self.InteractiveTB.mode == "Plain" and not hasattr(type(value), "_render_traceback_")
            if exception_only or not ours or issubclass(kind, SyntaxError | UsageError):
                super().showtraceback(exc_tuple, filename, tb_offset, exception_only, running_compiled_code)
            else:
                skip = self.InteractiveTB.tb_offset if tb_offset is None else tb_offset
                self._showtraceback(kind, value, [describe(value, trace, skip, self._place)])
        except BaseException as error:  # of a class of the cell's own
            print(f"{type(error).__name__}: {safely(error)}")

    def _format_exception_for_storage(self, exception: BaseException, *_: Any, **__: Any) -> list[str]:
        return [safely(exception)]  # what %notebook would write; a traceback there is one too many

    def _place(self, file: str, line: int) -> str:
        name = self.compile.format_code_name(file)
        return f"File {compress_user(file)}:{line}" if name is None else f"{name[0]} {name[1]}, line {line}"


_methods: dict[tuple[type, str], Any] = {}
"""Those of `RUNNING`, by the class that defines them, as they are before the first cell."""


def mend(shell: Plain) -> None:
    """After a cell: undoes what it has put over the methods that run cells, or done to them."""
    for kind in type(shell).__mro__[:-1]:
        for name in RUNNING:
            method = _methods.get((kind, name))
            if method is None and name in vars(kind):
                delattr(kind, name)
            elif method is not None and vars(kind).get(name) is not method:
                setattr(kind, name, method)
    for name in RUNNING:
        vars(shell).pop(name, None)
    if sys.getrecursionlimit() < SHALLOWEST:
        sys.setrecursionlimit(SHALLOWEST)


def can_run(shell: Plain) -> bool:
    """Whether a cell can be run at all: asked when one has failed, for it may be an earlier one's doing.

    What cells can spoil is without end (`sys.modules`, hooks, transformers); whether `pass` still runs is one question.
    """
    mend(shell)
    shell.showtraceback = lambda *_, **__: None  # type: ignore[method-assign]
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return shell.run_cell("pass", store_history=False).success is True
    except BaseException:
        return False
    finally:
        mend(shell)


def _plain(data: Any) -> str:
    """The text of what the pager was to show."""
    return str(data.get("text/plain", "")) if isinstance(data, dict) else str(data)


def _installer(shell: Plain, name: str) -> Any:
    program = f"{sys.executable} -m pip" if name == "pip" else name

    def magic(line: str) -> None:
        shell.system(f"{program} {line}")

    return magic


def answered(wanted: str) -> str:
    """A command that says, in place of one that installs, what is there and what can be used instead."""
    names = [name for word in wanted.split() if (name := re.match(r"['\"]?([A-Za-z][\w.-]*)", word))]
    if names and all(_installed(name[1]) for name in names):
        return f"(echo {shlex.quote('Already installed: ' + ', '.join(name[1] for name in names))})"
    found = [name for name in KNOWN if importlib.machinery.PathFinder.find_spec(name) is not None]
    use = " and ".join(["the standard library", *([", ".join(found)] if found else [])])
    note = f"[nothing can be installed here: there is no network; what there is: {use}]"
    return f"(echo {shlex.quote(note)}; exit 1)"


def _installed(name: str) -> bool:
    with contextlib.suppress(Exception):
        return bool(importlib.metadata.version(name))
    return False
