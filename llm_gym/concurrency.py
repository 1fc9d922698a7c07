"""Threads, event loops and retries, and where asynchronous code meets other code."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import math
import os
import queue
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from llm_gym.errors import PolicyError

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


def run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `coroutine` to its end and returns its result, also where an event loop is already running (Jupyter).

    There the coroutine gets an event loop of its own in a helper thread, and the caller's loop stands still
    until it is done, as it does for any blocking call. Ctrl-C cancels the coroutine, and waits for it to clean up.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _in_loop(coroutine)
    return _in_thread(coroutine)


def _in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, in one lasting loop of the main thread: what an environment or a judge keeps open in it (a
    connection, a task) is there in the next rollout. It ends with the first error. Other threads get one each time.

    The task ends without a result: Python 3.11 prints it, episodes and all, into an unused text.
    """
    outcome: list[T] = []

    async def main() -> None:
        with _woken_by_signals(asyncio.get_running_loop()):
            outcome.append(await coroutine)

    if threading.current_thread() is not threading.main_thread():
        asyncio.run(main())
        return outcome[0]
    try:
        _lasting().run(main())
    except BaseException:
        _close()  # what is left under way is cancelled, and cleans up
        raise
    return outcome[0]


_runners: list[asyncio.Runner] = []
"""The main thread's, once it was needed."""


def _lasting() -> asyncio.Runner:
    if not _runners:
        _runners.append(asyncio.Runner())
        atexit.register(_close)
    return _runners[0]


def _close() -> None:
    while _runners:
        _runners.pop().close()


os.register_at_fork(after_in_child=_runners.clear)  # the parent's loop waits on descriptors that a child shares


@contextlib.contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Lets every signal wake the loop.

    Python handles a signal between two bytecodes of the main thread. One that comes after the last of them and
    before the loop sleeps would wait until something else wakes it; where threads compete for the interpreter
    that is no rare moment, and with every environment waiting for a tool nothing else may.
    """
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":  # there it is built in
        yield
        return
    receive, send = socket.socketpair()
    with receive, send:
        receive.setblocking(False)
        send.setblocking(False)
        loop.add_reader(receive, receive.recv, 4096)
        before = signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(receive)


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
        finally:
            started.set()

    thread = Thread(target, name="llm_gym-run")
    try:
        thread.start()
        thread.join()
    except BaseException:
        if thread.is_alive():
            started.wait()
            for loop, task in running:
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            thread.join()
        raise
    if errors:
        raise errors[0]
    return outcome[0]


class Stopped(PolicyError):
    """A `Loop` was asked after its end, or ended meanwhile."""

    def __init__(self) -> None:
        super().__init__("The policy was closed.")


class Loop:
    """An event loop in a thread of its own, in which connections outlive the callers' loops.

    >>> loop = Loop("example")
    >>> loop.run(asyncio.sleep(0, "done"))
    'done'
    >>> loop.stop()
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self.stopped = self._halted = False
        self._door = threading.Lock()
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.thread = Thread(self._run, name=name)
        self.thread.start()

    async def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine`, run there, returns to a caller in another loop; cancelling the caller cancels it.

        Raises:
            Stopped: the loop was stopped, before or meanwhile.
        """
        try:
            return await asyncio.wrap_future(self.submit(coroutine))
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self.stopped and caller is not None and not caller.cancelling():
                raise Stopped from None
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` to its end; Ctrl-C cancels it.

        Raises:
            Stopped: the loop was stopped, before or meanwhile.
        """
        future = self.submit(coroutine)
        try:
            return future.result()
        except CancelledError:
            raise Stopped from None
        except BaseException:
            future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Begins `coroutine` there and does not wait; Stopped if the loop was stopped."""
        with self._door:  # what comes in is in the loop before its end is
            if not self.stopped:
                return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise Stopped

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancels what is still running there, lets it clean up, runs `last`, and ends the thread.

        May be repeated, from any thread but its own.
        """
        with self._door:
            self.stopped, self._last = True, self._last or last
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._halt)
        self.thread.join()

    def _halt(self) -> None:
        if not self._halted:
            self._halted = True
            self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            while left := asyncio.all_tasks(self._loop):  # what ends may begin something
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            if self._last is not None:
                self._loop.run_until_complete(self._last())
        finally:
            self._loop.close()


class Worker:
    """A daemon thread that runs one call after another: a blocking environment's, all in the same thread."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = Thread(self._serve, name="llm_gym-env")
        self._thread.start()

    async def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)` in the thread; a cancelled call runs on, its result unseen."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[list[T], BaseException | None]] = loop.create_future()

        def call() -> None:
            value: list[T] = []
            failed: BaseException | None = None
            try:
                value.append(function(*args, **kwargs))
            except BaseException as error:  # a future takes not each as its own: it would never hear of StopIteration
                failed = error
            _tell(loop, future, (value, failed))

        self._calls.put(call)
        value, failed = await future
        if failed is not None:
            raise failed
        return value[0]

    def stop(self, last: Callable[[], None]) -> None:
        """Runs `last` after the calls under way, then ends the thread; does not wait for it."""
        self._calls.put(last)
        self._calls.put(None)

    def join(self, seconds: float) -> bool:
        """Waits for the thread's end; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], outcome: T) -> None:
    """Settles `future` from another thread, unless it was cancelled or its loop is gone."""

    def settle() -> None:
        if not future.done():
            future.set_result(outcome)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)


FIRST, LONGEST = 0.25, 5.0
"""Seconds before the second try, and before any later one."""


def delay(attempt: int, fraction: float | None = None) -> float:
    """Seconds to wait after failure number `attempt` (from 0): doubled each time, with jitter.

    Between half and all of `min(LONGEST, FIRST * 2**attempt)`, so that requests that failed together do not
    return together ("equal jitter", https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        attempt: failures before this one.
        fraction: the jitter, in [0, 1); None: random.
    """
    most = min(LONGEST, FIRST * 2.0 ** min(attempt, 32))
    return most * (0.5 + 0.5 * (random.random() if fraction is None else fraction))


async def tries(until: Callable[[], float] = lambda: math.inf) -> AsyncIterator[int]:
    """Failures so far, 0 at first, for ever; pauses before every try but the first, for `delay`, but not past `until`.

    Args:
        until: when there is no point in waiting any longer, on the monotonic clock; asked before every pause.
    """
    for attempt in itertools.count():
        yield attempt
        await asyncio.sleep(max(min(delay(attempt), until() - time.monotonic()), 0.0))
