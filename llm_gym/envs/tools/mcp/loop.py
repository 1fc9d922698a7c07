"""The event loop, in a thread of its own, in which all sessions with MCP servers live."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
MARGIN = 5.0
"""Seconds beyond a deadline after which the loop itself is not waited for."""
CLOSING = 10.0
"""Seconds in which a session must be closed."""


class Loop:
    """An event loop in a thread, shared by whoever uses it; it ends when nobody does."""

    _lock = threading.Lock()
    _shared: Loop | None = None

    def __init__(self) -> None:
        self.users = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="llm_gym-mcp", daemon=True)
        self.thread.start()

    @classmethod
    def enter(cls) -> Loop:
        """The process's loop, with one more user."""
        with cls._lock:
            if cls._shared is None or not cls._shared.thread.is_alive():  # a forked child has no thread
                cls._shared = cls()
            cls._shared.users += 1
            return cls._shared

    def leave(self) -> None:
        """One user less; the last one ends the loop."""
        with self._lock:
            self.users -= 1
            if self.users or Loop._shared is not self:
                return
            Loop._shared = None
        with contextlib.suppress(TimeoutError):
            self.wait(self.submit(_drain()), CLOSING)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait(self, future: Future[T], timeout: float) -> T:
        """What the coroutine returns or raises.

        Raises:
            TimeoutError: there is nothing within `timeout` seconds and a margin.
        """
        try:
            return future.result(timeout + MARGIN)
        except (TimeoutError, CancelledError):
            future.cancel()
            raise TimeoutError from None


async def _drain() -> None:
    """Ends what is left in the loop, its helper threads too."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=CLOSING)
    await asyncio.get_running_loop().shutdown_default_executor()


def _after_fork() -> None:
    """A forked child starts with a lock that nobody holds; whoever held it is not here to let go."""
    Loop._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
