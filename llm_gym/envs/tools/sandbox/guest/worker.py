"""The fast personality: an IPython shell that answers over a socket.

One file per cell carries the code in and the output out: the trainer writes the code, the worker
makes the file its standard output, the trainer reads what follows the code. The trainer owns the
file, so nothing is lost when the worker dies, and what an earlier cell's processes still write goes
to a file that nobody reads.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from IPython.core.displayhook import DisplayHook

from .shell import Plain, can_run, configuration, mend
from .tracebacks import safely
from .wire import Channel

KEPT, MOST = 1 << 20, 16 << 20
"""Bytes of a cell's output: what is kept of its head and of its tail, and how long it may grow before it is cut."""
LEFT_OUT = b"\n[... output left out ...]\n"

_libc = ctypes.CDLL(None)
_main = threading.get_ident()
_current_cell = 0


class PlainDisplayHook(DisplayHook):
    """Prints the value of the last expression, without `Out[1]:`."""

    def write_output_prompt(self) -> None:
        """No prompt."""

    prompt_end_newline = True


class Shell(Plain):
    """A shell that prints."""

    displayhook_class = PlainDisplayHook

    def _showtraceback(self, etype: object, evalue: object, stb: list[str]) -> None:
        print(self.InteractiveTB.stb2text(stb).rstrip("\n"))


def make_shell() -> Shell:
    """The one shell of this process, not yet used."""
    config = configuration()
    config.InteractiveShell.separate_out = ""
    shell = Shell.instance(config=config)
    shell.furnish()
    return shell


class CellFile(io.FileIO):
    """Standard output of the current cell: unbuffered, cut in the middle, deaf to threads of earlier cells."""

    start = 0

    def write(self, data: Any) -> int:
        """Takes all of `data`; what a thread of an earlier cell writes, or does not fit any more, is dropped."""
        view = memoryview(data).cast("B")
        size = len(view)
        if _main != threading.get_ident() and getattr(threading.current_thread(), "_cell", 0) != _current_cell:
            return size
        try:
            here = os.lseek(self.fileno(), 0, os.SEEK_CUR)
            if here - self.start + size > MOST:
                view = self._cut(view, here)
            while view:
                view = view[os.write(self.fileno(), view) :]
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
        return size

    def _cut(self, view: memoryview, here: int) -> memoryview:
        """Leaves the head of all that was written, and of what follows it the tail; returns what is still to write."""
        head = self.start + KEPT
        if here < head:
            os.write(self.fileno(), view[: head - here])
            view, here = view[head - here :], head
        view = view[-KEPT:]
        tail = os.pread(self.fileno(), KEPT - len(view), max(head, here - KEPT + len(view)))
        os.ftruncate(self.fileno(), head)
        os.lseek(self.fileno(), head, os.SEEK_SET)
        os.write(self.fileno(), LEFT_OUT + tail)
        return view


class CellStream(io.TextIOWrapper):
    """The text side of a `CellFile`."""

    def __init__(self, fd: int) -> None:
        self.file = CellFile(fd, "w", closefd=False)
        super().__init__(self.file, "utf-8", "backslashreplace", "", write_through=True)

    def close(self) -> None:
        """Nothing: later prints still work."""


def _remember_cell() -> None:
    """Every thread carries the number of the cell that started it."""
    start = threading.Thread.start

    def remembering(thread: threading.Thread) -> None:
        by_main = _main == threading.get_ident()
        thread._cell = _current_cell if by_main else getattr(threading.current_thread(), "_cell", 0)  # type: ignore[attr-defined]
        start(thread)

    threading.Thread.start = remembering  # type: ignore[method-assign, assignment]


def main(request: dict[str, Any], fds: list[int], ready: Callable[[], object]) -> None:
    """Takes cells from the socket `fds[0]` until it closes."""
    global _current_cell, _main
    channel = Channel(socket.socket(fileno=fds[0]))
    channel.sock.set_inheritable(False)
    shell = Shell.instance()
    shell.enter()
    streams = CellStream(1), CellStream(2)
    _remember_cell()
    _main = threading.get_ident()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pid = os.getpid()
    ready()
    while True:
        message, files = channel.receive(fds=1)
        if message is None or not files:
            return
        if "seed" in message:
            _seed(message["seed"])
        _current_cell += 1
        ok = run(shell, streams, files[0], message["size"])
        os.close(files[0])
        if os.getpid() != pid:  # a fork that came back from the cell
            return
        if ok is None:  # no cell can be run any more: better a new session
            return
        channel.send({"id": message["id"], "ok": ok})


def _seed(seed: int) -> None:
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def run(shell: Shell, streams: tuple[CellStream, CellStream], fd: int, size: int) -> bool | None:
    """Runs the code in the first `size` bytes of `fd`, with `fd` as its standard output.

    Whether it succeeded; None if the shell can run no cell any more, which a cell can bring about.
    """
    code = os.pread(fd, size, 0).decode("utf-8", "surrogatepass")
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = streams
    for stream in streams:
        stream.file.start = size
    ok: bool | None = False
    try:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            ok = shell.run_cell(code, store_history=True).success is True  # type: ignore[no-untyped-call]
        except BaseException as error:
            print(f"{type(error).__name__}: {safely(error)}")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # in the cell's last moment, perhaps instead of the line above
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    mend(shell)
    _libc.fflush(None)
    if not ok and not can_run(shell):
        ok = None
    return ok
