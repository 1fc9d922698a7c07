"""Threads, and where asynchronous code meets other code: coroutines run to their end, blocking calls in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

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
    """`asyncio.run`, whose task ends without a result: Python 3.11 prints it, episodes and all, into an unused text."""
    outcome: list[T] = []

    async def main() -> None:
        with _woken_by_signals(asyncio.get_running_loop()):
            outcome.append(await coroutine)

    asyncio.run(main())
    return outcome[0]


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
