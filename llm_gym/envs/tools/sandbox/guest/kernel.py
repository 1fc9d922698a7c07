"""The Jupyter personality: an ipykernel on sockets that the trainer has bound.

It differs from a plain kernel where a trainer needs it to: standard output and error are one stream,
in order, cut in the middle; what child processes write belongs to the cell that waits for them; and
the stream is also copied into a file that the trainer owns, so nothing is lost when the kernel dies.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import zmq
from ipykernel import ipkernel
from ipykernel.control import ControlThread
from ipykernel.displayhook import ZMQDisplayHook, ZMQShellDisplayHook
from ipykernel.heartbeat import Heartbeat
from ipykernel.iostream import OutStream
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.shellchannel import ShellChannelThread
from ipykernel.zmqshell import ZMQDisplayPublisher, ZMQInteractiveShell
from IPython.core.profiledir import ProfileDir

from . import worker
from .shell import Plain, can_run, configuration, mend
from .tracebacks import safely
from .wire import Channel

PART = 1 << 18
"""Characters kept of a cell's output at its head, and at its tail; also of one displayed value."""
MARK = 1 + 32 + 8
"""Bytes of a mark: its beginning, which nobody else writes, and its number."""
FLUSHES, PAUSE = 100, 0.05
"""A cell may flush so often at once, then once a pause: each flush is a message."""


def clip(text: str) -> str:
    """A text that a message can carry: head and tail of a long one, without lone surrogates."""
    if len(text) > 2 * PART:
        text = f"{text[:PART]}\n[... output left out ...]\n{text[-PART:]}"
    return text.encode("utf-8", "backslashreplace").decode()


class Stream(OutStream):
    """Standard output and error of the kernel."""

    def __init__(self, session: Any, thread: Any, box: int) -> None:
        self.box, self.mark, self.marked = box, b"\0" + secrets.token_hex(16).encode(), threading.Event()
        self.marks = re.compile(re.escape(self.mark) + rb"([0-9a-f]{8})")
        self.asked = self.heard = 0
        self.busy = False
        self.cell: Any = None
        self.begin({})
        super().__init__(session, thread, "stdout")
        os.dup2(1, 2)

    def begin(self, parent: Any) -> None:
        """A cell starts."""
        self.cell = parent
        self.room, self.tail, self.flushes, self.last = PART, "", 0, 0.0
        os.ftruncate(self.box, 0)

    def catch_up(self) -> None:
        """What children and C code have written to the descriptor is in the stream after this.

        It waits for a mark, numbered because an earlier one may come late, as long as something is being read.
        """
        if not self._is_master_process():
            return  # a fork has no thread that reads
        self.asked += 1
        os.write(1, self.mark + b"%08x" % self.asked)
        while self.heard < self.asked:
            self.marked.clear()
            if self.heard < self.asked and not self.marked.wait(1.0) and not self._reading():
                return  # the cell has made its descriptor lead elsewhere

    def _reading(self) -> bool:
        assert self._fid is not None
        return bool(select.select([self._fid], [], [], 0)[0]) or self.busy

    def finish(self) -> None:
        """A cell ends: what its children wrote, and the tail of what was cut, go out."""
        self.catch_up()
        tail, self.tail, self.room = self.tail, "", PART
        if tail:
            tail = clip(tail)
            super().write("\n[... output left out ...]\n" + tail if len(tail) >= PART else tail)
        self.flushes = 0

    def write(self, string: str) -> int:
        """Sends the head of the cell's output at once and keeps its tail for the end."""
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string)}")
        if not self._is_master_process() or self.parent_header.get("msg_id") != self.cell.get("msg_id"):
            super().write(clip(string[:PART]))  # of another cell: whoever listens will not want it
            return len(string)
        self._keep(string)
        head, rest = string[: self.room], string[self.room :]
        self.room -= len(head)
        if head:
            super().write(clip(head))
        if rest:
            self.tail = (self.tail + rest[-PART:])[-PART:]
        return len(string)

    def _keep(self, string: str) -> None:
        data = string[:PART].encode("utf-8", "backslashreplace")
        if os.fstat(self.box).st_size < 4 * PART:
            os.pwrite(self.box, data, os.fstat(self.box).st_size)

    def flush(self, force: bool = False) -> None:
        """Sends what is waiting; code that flushes all the time is slowed down."""
        self.flushes += 1
        now = time.monotonic()
        if force or self.flushes <= FLUSHES or now - self.last > PAUSE:
            self.last = now
            super().flush()

    def _watch_pipe_fd(self) -> None:
        rest, pipe = b"", self._fid
        assert pipe is not None
        while select.select([pipe], [], []):
            self.busy = True  # before the pipe is empty
            if not (data := os.read(pipe, 1 << 16)):
                return
            rest = self._split(rest + data)
            self.busy = False

    def _split(self, data: bytes) -> bytes:
        """Passes on what is not a mark; returns the beginning of one whose other half is still to come."""
        *parts, last = self.marks.split(data)
        for part, number in zip(parts[::2], parts[1::2], strict=True):
            self._pass_on(part)
            self.heard = int(number, 16)
            self.marked.set()
        cut = last.rfind(b"\0")
        half = cut >= 0 and len(last) - cut < MARK and last[cut:].startswith(self.mark[: len(last) - cut])
        self._pass_on(last[:cut] if half else last)
        return last[cut:] if half else b""

    def _pass_on(self, data: bytes) -> None:
        if data:
            self.write(data.decode("utf-8", "replace"))

    def close(self) -> None:
        """Nothing: later prints still work."""


def _flush() -> None:
    if isinstance(sys.stdout, Stream):
        with contextlib.suppress(OSError):  # a cell may close descriptor 1
            sys.stdout.catch_up()
        sys.stdout.flush(force=True)


class Hook(ZMQShellDisplayHook):
    """Values keep their place in the output, and within bounds."""

    def write_format_data(self, format_dict: dict[str, Any], md_dict: Any = None) -> None:
        """Clips long texts."""
        super().write_format_data({k: clip(v) if isinstance(v, str) else v for k, v in format_dict.items()}, md_dict)

    def finish_displayhook(self) -> None:
        """What was printed before comes before."""
        _flush()
        super().finish_displayhook()


class Publisher(ZMQDisplayPublisher):
    """As `Hook`, for display()."""

    def _flush_streams(self) -> None:
        _flush()

    def publish(self, data: dict[str, Any], *args: Any, **more: Any) -> None:
        """Clips long texts."""
        super().publish({k: clip(v) if isinstance(v, str) else v for k, v in data.items()}, *args, **more)


class Shell(Plain, ZMQInteractiveShell):
    """The kernel's shell."""

    displayhook_class = Hook
    display_pub_class = Publisher

    def catch_up(self) -> None:
        """The order of what the cell and its children write is kept."""
        _flush()

    def _showtraceback(self, etype: Any, evalue: Any, stb: list[str]) -> None:
        _flush()
        words = {
            "ename": clip(safely(etype.__name__)),
            "evalue": clip(safely(evalue)),
            "traceback": [clip(self.InteractiveTB.stb2text(stb))],
        }
        hook: Any = self.displayhook
        hook.session.send(hook.pub_socket, "error", words, hook.parent_header, ident=b"error")
        self._last_traceback = stb


class Kernel(IPythonKernel):
    """Tells the stream where a cell begins and ends."""

    shell_class = Shell
    shell: Any
    stream: Stream

    async def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: Any = None,
        allow_stdin: bool = False,
        *,
        cell_meta: Any = None,
        cell_id: str | None = None,
    ) -> Any:
        """Runs one cell."""
        pid, count = os.getpid(), self.execution_count
        self.stream.begin(self.get_parent("shell").get("header", {}))
        status = "error"
        try:
            try:
                reply = await super().do_execute(
                    code, silent, store_history, user_expressions, allow_stdin, cell_meta=cell_meta, cell_id=cell_id
                )
                status = reply["status"]
            except (Exception, SystemExit) as error:
                if self.execution_count == count:  # else the cell has run; it is str() of its exception that fails
                    print(f"{type(error).__name__}: {safely(error)}")
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # in the cell's last moment, perhaps instead of the line above
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        finally:
            if os.getpid() != pid:  # a fork that came back from the cell
                os._exit(0)
            mend(self.shell)
            sys.stdout = sys.stderr = self.stream
            if status == "error" and not can_run(self.shell):  # better a new session
                os._exit(1)
            self.stream.finish()
        ended: dict[str, Any] = {"status": status, "execution_count": self.execution_count - 1, "payload": []}
        return {**ended, "user_expressions": {}, "ename": "", "evalue": "", "traceback": []}


@contextlib.contextmanager
def no_modules() -> Iterator[None]:
    """A kernel lists the files of all modules for its debugger: megabytes that would no longer be the zygote's."""
    module: Any = ipkernel
    module.sys = types.SimpleNamespace(**{**vars(sys), "modules": {}})
    try:
        yield
    finally:
        module.sys = sys


class Beat(Heartbeat):
    """The heartbeat on a socket that is already bound."""

    fd = -1

    def _try_bind_socket(self) -> Any:
        self.socket.setsockopt(zmq.USE_FD, self.fd)
        return super()._try_bind_socket()


class App(IPKernelApp):
    """A kernel without files: no connection file, no profile, no history, and sockets by descriptor."""

    kernel_class = Kernel
    listening: dict[int, int]
    box: int

    def initialize(self, argv: Any = None) -> None:
        """Only what a session needs of IPKernelApp.initialize."""
        self.profile_dir = ProfileDir()
        self.init_sockets()
        self.init_heartbeat()
        self.init_io()
        self.init_signal()
        with no_modules():
            self.init_kernel()
        self.kernel.stream = self.stream
        self.init_path()
        self.init_shell()

    def _try_bind_socket(self, s: Any, port: int) -> int:
        s.setsockopt(zmq.USE_FD, self.listening[port])
        return int(super()._try_bind_socket(s, port))

    def init_control(self, context: Any) -> None:
        """Control without a debugger, whose socket would connect to this very process."""
        self.control_socket = context.socket(zmq.ROUTER)
        self.control_socket.linger = 1000
        self.control_port = self._bind_socket(self.control_socket, self.control_port)
        self.control_socket.router_handover = 1
        self.debugpy_socket, self.debug_shell_socket = context.socket(zmq.STREAM), context.socket(zmq.DEALER)
        self.control_thread = ControlThread(daemon=True)
        self.shell_channel_thread = ShellChannelThread(context, daemon=True)

    def init_heartbeat(self) -> None:
        """The heartbeat thread."""
        self.heartbeat = Beat(zmq.Context(), (self.transport, self.ip, self.hb_port))
        self.heartbeat.fd = self.listening[self.hb_port]
        self.heartbeat.start()

    def init_io(self) -> None:
        """One stream for both."""
        self.stream = sys.stdout = sys.stderr = Stream(self.session, self.iopub_thread, self.box)
        self.displayhook = sys.displayhook = ZMQDisplayHook(self.session, self.iopub_socket)


def main(request: dict[str, Any], fds: list[int], ready: Callable[[], object]) -> None:
    """Serves the kernel. `fds`: a channel that only shows whether we live, the output's copy, then the sockets."""
    alive = Channel(socket.socket(fileno=fds[0]))
    alive.sock.set_inheritable(False)
    worker.Shell.clear_instance()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = configuration()
    config.IPKernelApp.log_level = 50
    config.Session.key = request["key"].encode()
    config.Session.signature_scheme = "hmac-sha256"
    ports = {f"{name}_port": number for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)}
    app = App.instance(config=config, transport="ipc", ip=request["ip"], **ports)
    app.box, app.listening = fds[1], dict(enumerate(fds[2:], 1))
    for fd in fds[1:]:
        os.set_inheritable(fd, False)
    app.initialize()
    shell: Any = app.shell
    shell.furnish()
    shell.enter()
    ready()
    app.start()
