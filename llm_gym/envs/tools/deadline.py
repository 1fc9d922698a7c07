"""Calls that may hang, with a deadline: the caller goes on, the call keeps its thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Overdue(Exception):
    """A call missed its deadline."""


class Runner:
    """Runs functions one after another in a thread of its own.

    A call that misses its deadline is abandoned: nothing can stop a Python thread, so it runs on by itself (and
    ends with the process), and the next call gets a new thread.
    """

    def __init__(self, name: str = "llm_gym-tool") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        self._thread: threading.Thread | None = None

    def call(self, function: Callable[..., Any], timeout: float | None, /, **arguments: Any) -> Any:
        """What `function(**arguments)` returns or raises.

        Raises:
            Overdue: it took more than `timeout` seconds; never, if that is None.
        """
        if self._jobs is None or self._thread is None or not self._thread.is_alive():  # a forked child has no thread
            self._jobs = queue.SimpleQueue()
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)  # an environment that nobody closed leaves no thread
        job = _Job(function, arguments)
        self._jobs.put(job)
        if not job.done.wait(timeout):
            self._jobs.put(None)  # should the call come back, its thread ends
            self._jobs = self._thread = None
            raise Overdue
        if job.error is not None:
            raise job.error
        return job.result

    def close(self) -> None:
        """Ends the thread; it has nothing to do, so it ends at once."""
        if self._jobs is not None and self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
        self._jobs = self._thread = None


class _Job:
    """One call, and what came of it."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.function, self.arguments = function, arguments
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.function(**self.arguments)
        except BaseException as error:
            self.error = error
        self.done.set()


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # holds the environment's tools
