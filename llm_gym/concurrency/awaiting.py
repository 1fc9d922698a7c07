"""Functions that may be `async def`, for callers that await and for those that cannot."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

from llm_gym.concurrency.loops import run_here
from llm_gym.concurrency.threads import waiting_loop

T = TypeVar("T")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is `async def`, as a method, in a `partial`, or as the `__call__` of an object."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def wait(outcome: T | Awaitable[T]) -> T:
    """What a function that may be `async def` returned, awaited if need be."""
    return await outcome if inspect.isawaitable(outcome) else outcome


def finish(outcome: T | Awaitable[T]) -> T:
    """`wait` for callers that cannot await.

    In a thread that an event loop waits for, it is awaited there, so that all episodes share one loop, and may share
    what is bound to it (the connections of a client); elsewhere by `run_here`.

    >>> async def double(number: int) -> int:
    ...     return 2 * number
    >>> finish(double(3)), finish(7)
    (6, 7)
    """
    if not inspect.isawaitable(outcome):
        return outcome
    loop = waiting_loop()
    return run_here(wait(outcome)) if loop is None else loop.ask(wait(outcome))


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that never has to wait; no event loop is needed.

    Raises:
        RuntimeError: it has to.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    coroutine.close()
    raise RuntimeError(f"{coroutine!r} waits for something, where nothing can be awaited.")
