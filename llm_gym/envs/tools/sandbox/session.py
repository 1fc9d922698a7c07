"""A Python interpreter for one episode: cells go in, text comes out, and nothing else gets out."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

from llm_gym.envs.tools.sandbox import pool, text
from llm_gym.envs.tools.sandbox.guest.wire import poll
from llm_gym.envs.tools.sandbox.isolation import Tier
from llm_gym.envs.tools.sandbox.limits import Limits
from llm_gym.envs.tools.sandbox.sandbox import Handle
from llm_gym.errors import SettingError, unknown


@dataclass(frozen=True)
class CellResult:
    """What came of one cell."""

    output: str
    """Standard output and error, the value of the last expression and the traceback, in the order written;
    terminal escapes removed, and no more than `Limits.output` characters (head and tail). If the cell was
    stopped or the session lost, the last line says so."""
    status: str
    """`ok`, `error` (an exception), `timeout`, `died` (the interpreter ended) or `too_long` (not run)."""
    seconds: float
    """From the call to the answer."""
    lost: bool = False
    """The variables of earlier cells are gone; the next cell meets a fresh interpreter."""


class Conversation(Protocol):
    """How one backend runs a cell."""

    def start(self, handle: Any, code: str, seed: int | None) -> None:
        """Sends the cell."""

    def finish(self, handle: Any, seconds: float) -> bool | None:
        """Whether the cell succeeded; None if it has not ended within `seconds`. ConnectionError: it never will."""

    def output(self, most: int) -> str:
        """What it wrote so far, at most `most` characters."""

    def close(self) -> None:
        """Lets go of the cell's output."""


class WorkerCell:
    """A cell of the worker: one file takes the code in and the output out."""

    def start(self, handle: Any, code: str, seed: int | None) -> None:
        """Writes the code into a new file and hands it over."""
        data = code.encode("utf-8", "surrogatepass")
        self.id, self.size = secrets.randbits(53), len(data)
        self.fd = os.memfd_create("cell") if hasattr(os, "memfd_create") else _temporary()
        while data:
            data = data[os.write(self.fd, data) :]
        handle.cells.send({"id": self.id, "size": self.size, **({} if seed is None else {"seed": seed})}, [self.fd])

    def finish(self, handle: Any, seconds: float) -> bool | None:
        """Waits for the answer that carries this cell's number; others are of cells long over, or forged."""
        deadline = time.monotonic() + seconds
        while True:
            if not handle.cells.pending():
                ready = poll([handle.cells, handle.lease], deadline - time.monotonic())
                if not ready:
                    return None
                if handle.cells not in ready:
                    raise ConnectionError
            message, _ = handle.cells.receive()
            if message is None:
                raise ConnectionError
            if message.get("id") == self.id:
                return message.get("ok") is True
            if time.monotonic() > deadline:
                return None

    def output(self, most: int) -> str:
        """What the file holds after the code."""
        return text.read(self.fd, self.size, most)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.fd)


def _temporary() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _worker() -> tuple[type[Handle], type[Conversation]]:
    return Handle, WorkerCell


def _jupyter() -> tuple[type[Handle], type[Conversation]]:
    from llm_gym.envs.tools.sandbox.kernels import KernelCell, KernelHandle

    return KernelHandle, KernelCell


BACKENDS = {"worker": _worker, "jupyter": _jupyter}
"""What a session of each backend is, and how it runs a cell."""


class PythonSession:
    """A fresh interpreter for one episode. Its state persists between cells; use it from one thread at a time.

    Args:
        backend: `worker`, an IPython shell on a socket (fast), or `jupyter`, a Jupyter kernel.
        sandbox: `auto`, `required` (refuses to run without isolation), or a tier by name.
        limits: what the session may use.
        seed: of Python's and numpy's global random numbers; by default they differ from session to session.

    Raises:
        SettingError: an unknown backend or tier, or one that this machine does not allow.
    """

    def __init__(
        self,
        backend: str = "worker",
        sandbox: str = "auto",
        limits: Limits | None = None,
        seed: int | None = None,
    ) -> None:
        if backend not in BACKENDS:
            raise SettingError(unknown("backend", backend, BACKENDS))
        self.backend, self.limits, self.seed = backend, limits or Limits(), seed
        kind, self._cell = BACKENDS[backend]()
        self.tier = pool.tier(sandbox)
        self._closed = False
        self._seeded = False
        self.held = _Held(kind, self.tier, self.limits)
        self._end = weakref.finalize(self, self.held.release)
        self.held.take()

    def run(self, code: str, timeout: float = 10.0) -> CellResult:
        """Runs one cell and waits for its end, at most `timeout` seconds plus `limits.grace`.

        A late cell is interrupted; if that does not end it, the session is killed and replaced.

        Raises:
            RuntimeError: the session is closed.
            SandboxError: no session could be started.
        """
        began = time.monotonic()
        if self._closed:
            raise RuntimeError("this PythonSession is closed.")
        if os.getpid() != self.held.owner:
            raise RuntimeError("a PythonSession cannot be used in a forked process; make one there.")
        size = len(code.encode("utf-8", "surrogatepass"))
        if size > self.limits.code:
            note = f"[not run: the cell has {size:,} bytes; the limit is {self.limits.code:,}]"
            return CellResult(note, "too_long", time.monotonic() - began)
        self._seeded = self._seeded and self.held.handle is not None
        handle = self.held.take()
        cell = self._cell()
        try:
            cell.start(handle, code, None if self._seeded else self.seed)
            self._seeded = True
            status, note = self._wait(handle, cell, timeout)
            written = cell.output(self.limits.output)
        finally:
            cell.close()
        if note and written and not written.endswith("\n"):
            written += "\n"
        return CellResult(written + note, status, time.monotonic() - began, lost=self.held.handle is None)

    def _wait(self, handle: Any, cell: Conversation, timeout: float) -> tuple[str, str]:
        """The status, and what to tell about it; a session that cannot go on is ended."""
        try:
            ok = cell.finish(handle, timeout)
            if ok is not None:
                return ("ok" if ok else "error"), ""
            if handle.interrupt() and cell.finish(handle, self.limits.grace) is not None:
                return "timeout", f"[interrupted after {timeout:g} s; variables are kept]"
            self.held.release()
            return "timeout", f"[stopped after {timeout:g} s; the interpreter was restarted, all variables are gone]"
        except ConnectionError:
            self.held.release()
            return "died", "[the interpreter ended; it was restarted, all variables are gone]"

    def close(self) -> None:
        """Kills everything that the episode started. Twice is once."""
        self._closed = True
        self._end()

    def __enter__(self) -> PythonSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Held:
    """The session's handle, apart from the session so that a forgotten session can still be ended."""

    def __init__(self, kind: type[Handle], tier: Tier, limits: Limits) -> None:
        self.key = (kind, tier, limits)
        self.handle: Handle | None = None
        self.owner = os.getpid()

    def take(self) -> Handle:
        """What it holds, or else a session from the pool."""
        if self.handle is None:
            self.handle = pool.take(*self.key)
        return self.handle

    def release(self) -> None:
        """Ends the session, if there is one; in a forked child it only lets go of it."""
        handle, self.handle = self.handle, None
        if handle is None:
            return
        if os.getpid() != self.owner:
            handle.abandon()
            return
        handle.end()
        pool.give_back(*self.key)
