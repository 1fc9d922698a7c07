"""Threads that can be waited for: one that runs calls in their order, and calls with a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Thread(threading.Thread):
    """A daemon thread; a `join` that was interrupted may be repeated, and waits as the first one did.

    `threading.Thread.join` before Python 3.13 takes the thread for ended once a `KeyboardInterrupt` has come out of
    it: every later `join` returns at once, and a thread inside torch while the interpreter is taken down aborts the
    process.

    >>> thread = Thread(print, name="greeter", args=("hello",))
    >>> thread.start(); thread.join()
    hello
    """

    def __init__(self, target: Callable[..., object], *, name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self._begun, self._over = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begins. Interrupted by Ctrl-C, it lets the thread begin first: who started it can then end it."""
        try:
            super().start()
        except KeyboardInterrupt:
            self._begun.wait(1.0)
            raise

    def run(self) -> None:
        """Runs the target."""
        self._begun.set()
        try:
            super().run()
        finally:
            self._over.set()

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end, for at most `timeout` seconds."""
        if self._over.wait(timeout):
            super().join()


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a call came to, as a value: what it raised is nobody's but the caller's."""

    value: list[T]
    """What it returned; empty if it raised."""
    error: BaseException | None = None

    def get(self) -> T:
        """What it returned; raises what it raised."""
        if self.error is not None:
            raise self.error
        return self.value[0]


def cancelled() -> bool:
    """Whether the running task is being cancelled: a CancelledError without that is of the code that raised it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def settled(awaitable: Awaitable[T]) -> Outcome[T]:
    """What `awaitable` comes to, as a value: SystemExit, raised in a task, would end its loop."""
    try:
        return Outcome([await awaitable])
    except BaseException as error:
        try:
            by_caller = cancelled()
        except RuntimeError:  # it was left behind by its loop, and ends with what it waits for
            raise error from None
        if by_caller:
            raise
        return Outcome([], error)


class WaitingLoop:
    """The event loop that waits for a call in a worker's thread, which may have something awaited there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._left = loop, False
        self._asked: Future[Outcome[Any]] | None = None
        self._task: asyncio.Task[Outcome[Any]] | None = None

    def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises there; called in the thread.

        Raises:
            CancelledError: of `concurrent.futures`; nobody waits for the call any more.
        """
        asked: Future[Outcome[T]]
        asked = self._asked = Future()  # before the look at `_left`: whichever of the two is later sees the other
        try:
            if self._left:
                raise CancelledError
            self._loop.call_soon_threadsafe(self._begin, coroutine, asked)
        except BaseException:
            coroutine.close()
            raise
        return asked.result().get()

    def _begin(self, coroutine: Coroutine[Any, Any, T], asked: Future[Outcome[T]]) -> None:
        if self._left:
            coroutine.close()
            return

        def tell(task: asyncio.Task[Outcome[T]]) -> None:
            if task.cancelled() or task.exception() is not None:  # while it cleaned up
                asked.cancel()
            elif not asked.cancelled():
                asked.set_result(task.result())

        self._task = self._loop.create_task(settled(coroutine))
        self._task.add_done_callback(tell)

    async def leave(self) -> None:
        """Waits for the call no more. What it has asked for is cancelled, and cleans up while the loop still runs:
        the rollout that ends here may be the last one."""
        self._left = True
        if self._asked is not None:
            self._asked.cancel()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])


_here = threading.local()


def waiting_loop() -> WaitingLoop | None:
    """The one that waits for what is under way in this thread, if one does."""
    return getattr(_here, "loop", None)


class Worker:
    """A daemon thread that runs one call after another: a blocking environment's, all in the same thread."""

    def __init__(self, name: str = "llm_gym-env") -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = Thread(_serve, name=name, args=(self._calls,))  # not of this object, which may be let go of
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; in a forked child it does not."""
        return self._thread.is_alive()

    async def run(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)` in the thread; a cancelled call runs on, its result unseen."""
        loop = asyncio.get_running_loop()
        waiting = WaitingLoop(loop)
        future: asyncio.Future[Outcome[T]] = loop.create_future()

        def call() -> None:
            _here.loop = waiting
            try:
                outcome = Outcome([function(*args, **kwargs)])
            except BaseException as error:  # a future takes not each as its own: it would never hear of StopIteration
                outcome = Outcome([], error)
            _here.loop = None
            _tell(loop, future, outcome)

        self._calls.put(call)
        try:
            outcome = await future
        except asyncio.CancelledError:
            await waiting.leave()
            raise
        return outcome.get()

    def submit(self, function: Callable[..., T], /, **kwargs: Any) -> Future[T]:
        """`function(**kwargs)` in the thread, for a caller that waits outside any event loop."""
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function(**kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def stop(self, last: Callable[[], None] | None = None) -> None:
        """Runs `last` after the calls under way, then ends the thread; does not wait for it."""
        if last is not None:
            self._calls.put(last)
        self._calls.put(None)

    def join(self, seconds: float | None = None) -> bool:
        """Waits for the thread's end; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # holds the environment


class Overdue(Exception):
    """A call missed its deadline."""


class Runner:
    """Runs functions one after another in a thread of its own, each with a deadline.

    A call that misses it is abandoned: nothing can stop a Python thread, so it runs on by itself (and ends with the
    process), and the next call gets a new thread.
    """

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def call(self, function: Callable[..., T], timeout: float | None, /, **arguments: Any) -> T:
        """What `function(**arguments)` returns or raises.

        Raises:
            Overdue: it took more than `timeout` seconds; never, if that is None.
        """
        future = self._ready().submit(function, **arguments)
        if not wait([future], timeout).done:
            self._abandon()
            raise Overdue
        return future.result()

    async def run(self, function: Callable[..., T], timeout: float | None, /, **arguments: Any) -> T:
        """`call` for who awaits; a call that is cancelled is abandoned too."""
        try:
            return await within(timeout, self._ready().run(function, **arguments))
        except (Overdue, asyncio.CancelledError):
            self._abandon()
            raise

    def close(self) -> None:
        """Ends the thread; it has nothing to do, so it ends at once."""
        if self._worker is not None and self._worker.alive:
            self._worker.stop()
            self._worker.join()
        self._worker = None

    def _ready(self) -> Worker:
        """The thread, begun if there is none."""
        if self._worker is None or not self._worker.alive:
            self._worker = Worker("llm_gym-tool")
            weakref.finalize(self, self._worker.stop)  # an environment that nobody closed leaves no thread
        return self._worker

    def _abandon(self) -> None:
        """Leaves the call under way to itself; should it come back, its thread ends."""
        if self._worker is not None:
            self._worker.stop()
        self._worker = None


async def within(seconds: float | None, awaitable: Awaitable[T]) -> T:
    """What `awaitable` comes to.

    Raises:
        Overdue: not in so many seconds; never, if that is None.
    """
    clock = asyncio.timeout(seconds)
    try:
        async with clock:
            return await awaitable
    except TimeoutError:
        if clock.expired():
            raise Overdue from None
        raise


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], outcome: T) -> None:
    """Settles `future` from another thread, unless it was cancelled or its loop is gone."""

    def settle() -> None:
        if not future.done():
            future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)
