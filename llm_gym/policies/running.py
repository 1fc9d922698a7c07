"""Running a coroutine from code that is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `coroutine` to its end and returns its result, also where an event loop is already running (Jupyter).

    There the coroutine gets an event loop of its own in a helper thread, and the caller's loop stands still
    until it is done, as it does for any blocking call. Ctrl-C cancels the coroutine, and waits for it to clean up.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    return _in_thread(coroutine)


def _in_thread(coroutine: Coroutine[Any, Any, T]) -> T:
    outcome: list[T] = []
    errors: list[BaseException] = []
    started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = []

    async def main() -> T:
        task = asyncio.ensure_future(coroutine)
        running.append((asyncio.get_running_loop(), task))
        started.set()
        return await task

    def target() -> None:
        try:
            outcome.append(asyncio.run(main()))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="llm_gym-run", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        started.wait()
        loop, task = running[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    if errors:
        raise errors[0]
    return outcome[0]
