"""A pool of worker processes that compare answers, each killed and replaced when it overruns its deadline.

sympy can be made to compute for hours, so it never runs in this process. Workers start when they are
first needed and are shared by all threads; a forked child forgets its parent's and starts its own.
They read nothing but their pipe, hold no file or socket of this process, and end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm_gym.errors import SettingError

DEADLINE = 5.0
"""Seconds for one case, from when a worker takes it."""
MEMORY = 2 << 30
"""Bytes of address space of a worker."""
START = 120.0
"""Seconds in which a worker must be ready (sympy takes one or two on an idle machine)."""
CASES = 5000
"""Cases after which a worker is replaced, so that sympy's caches stay small."""


class Worker:
    """One process and the two pipes to it; used by one thread at a time."""

    def __init__(self) -> None:
        self.cases = 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llm_gym.envs.grading.worker", str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for this process
        )

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Waits until it has imported what it needs.

        Raises:
            SettingError: it ended or hung instead.
        """
        if self._receive(START) == "ready":
            self._close(self._process.stderr)
            return
        self.end()
        errors = self._process.stderr.read().decode(errors="replace").split("\n") if self._process.stderr else []
        said = next((line.strip() for line in reversed(errors) if line.strip()), "it said nothing")
        raise SettingError(f"grading: a worker process could not start ({said}); is math-verify installed?")

    def ask(self, gold: str, answer: str, *, ordered: bool, deadline: float) -> str:
        """The verdict of `compare`, or `timeout`, or `crashed` (it is of no use then)."""
        self.cases += 1
        body = json.dumps([gold, answer, ordered, deadline]).encode()
        try:
            os.write(self._fileno(self._process.stdin), struct.pack(">I", len(body)) + body)
        except OSError:
            return "crashed"
        return self._receive(deadline)

    def _receive(self, seconds: float) -> str:
        """One frame's value; `timeout` or `crashed` if none came."""
        end = time.monotonic() + seconds
        data, size, stream = b"", 4, self._fileno(self._process.stdout)
        waiter = select.poll()
        waiter.register(stream, select.POLLIN)
        while len(data) < size:
            if not waiter.poll(max(0.0, end - time.monotonic()) * 1000):
                return "timeout"
            chunk = os.read(stream, size - len(data))
            if not chunk:
                return "crashed"
            data += chunk
            if len(data) == 4:
                size += struct.unpack(">I", data)[0]
        return str(json.loads(data[4:]))

    def end(self) -> None:
        """Kills the process, whatever it does, and reaps it."""
        self._process.kill()
        self._process.wait()

    def kill(self) -> None:
        """Kills the process and closes the pipes to it."""
        self.end()
        self._close_all()

    def forget(self) -> None:
        """Lets go of a parent's worker, in a forked child: the process is not ours to end."""
        self._close_all()
        self._process.returncode = 0  # else its finaliser waits for a process that is no child of ours

    def _close_all(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            self._close(stream)

    @staticmethod
    def _fileno(stream: Any) -> int:
        return -1 if stream is None or stream.closed else int(stream.fileno())

    @staticmethod
    def _close(stream: Any) -> None:
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not yet written has nobody to read it
                stream.close()


class Pool:
    """At most `size` workers, started as they are needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._changed = threading.Condition()
        self._closed = False

    def ask(self, gold: str, answer: str, *, ordered: bool = True, deadline: float = DEADLINE) -> str:
        """The verdict on one case: `equal`, `different`, `unparsed`, `timeout` or `crashed`.

        A worker that dies under a case may have been at its end before; a new one gets the case once more.

        Raises:
            SettingError: no worker can be started.
        """
        while (worker := self._take()) is not None:
            verdict = "crashed"
            try:
                fresh = worker.cases == 0
                if fresh:
                    worker.wait_ready()
                verdict = worker.ask(gold, answer, ordered=ordered, deadline=deadline)
            finally:
                self._give_back(worker, keep=verdict not in ("timeout", "crashed") and worker.cases < CASES)
            if verdict != "crashed" or fresh:
                return verdict
        return "crashed"

    def pids(self) -> list[int]:
        """Process ids of the workers alive."""
        with self._changed:
            return [worker.pid for worker in self._all]

    def close(self) -> None:
        """Kills every worker; a case under way ends as `crashed`."""
        with self._changed:
            self._closed = True
            idle, busy = self._idle, self._all.difference(self._idle)
            self._idle = []
            self._changed.notify_all()
        for worker in idle:
            worker.kill()
        for worker in busy:
            worker.end()  # its pipes are closed by the thread that reads them

    def forget(self) -> None:
        """Lets go of every worker, in a forked child."""
        for worker in self._all:
            worker.forget()

    def _take(self) -> Worker | None:
        """An idle worker, or a new one, or the next that becomes idle; None once the pool is closed."""
        with self._changed:
            while not self._closed:
                if self._idle:
                    return self._idle.pop()
                if len(self._all) < self.size:
                    worker = Worker()
                    self._all.add(worker)
                    return worker
                self._changed.wait()
        return None

    def _give_back(self, worker: Worker, *, keep: bool) -> None:
        with self._changed:
            keep = keep and not self._closed
            if keep:
                self._idle.append(worker)
            else:
                self._all.discard(worker)
            self._changed.notify()
        if not keep:
            worker.kill()


_pool: Pool | None = None
_lock = threading.Lock()


def pool() -> Pool:
    """This process's pool: a worker for each core, at most 8 (the environment's `LLM_GYM_GRADERS` says otherwise)."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = Pool(int(os.environ.get("LLM_GYM_GRADERS", 0)) or min(8, os.cpu_count() or 1))
        return _pool


def close() -> None:
    """Ends this process's workers; the next case starts new ones."""
    global _pool
    with _lock:
        ended, _pool = _pool, None
    if ended is not None:
        ended.close()


def _after_fork() -> None:
    """A forked child starts with no workers and a lock that nobody holds."""
    global _pool, _lock
    if _pool is not None:
        _pool.forget()
    _pool, _lock = None, threading.Lock()


def _environment() -> dict[str, str]:
    """A worker imports what this process can, and gets none of its secrets."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "TMPDIR")}
    here = str(Path(__file__).parents[3])
    path = os.pathsep.join([here, *(os.path.abspath(entry) for entry in sys.path)])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


atexit.register(close)
os.register_at_fork(after_in_child=_after_fork)
