"""Event loops, and where asynchronous code meets other code."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar, cast

from llm_gym.concurrency.threads import Thread, cancelled, settled, waiting_loop
from llm_gym.errors import PolicyError

T = TypeVar("T")


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


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is `async def`, as a method, in a `partial`, or as the `__call__` of an object."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def wait(outcome: T | Awaitable[T]) -> T:
    """What a function that may be `async def` returned, awaited if need be."""
    return await outcome if isinstance(outcome, Awaitable) else outcome


def finish(outcome: T | Awaitable[T]) -> T:
    """`wait` for callers that cannot await.

    In a thread that an event loop waits for, it is awaited there, so that all episodes share one loop, and may share
    what is bound to it (the connections of a client); elsewhere by `run_here`.

    >>> async def double(number: int) -> int:
    ...     return 2 * number
    >>> finish(double(3)), finish(7)
    (6, 7)
    """
    if not hasattr(outcome, "__await__"):  # asked at every step
        return outcome
    loop = waiting_loop()
    return run_here(settled(outcome)).get() if loop is None else loop.ask(wait(outcome))


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


ENDING = (KeyboardInterrupt, SystemExit)
"""What asyncio lets through a loop when a task raises it; whoever waits for the task is told too."""


class Stopped(PolicyError):
    """A `Loop` was asked after its end, or ended meanwhile."""

    def __init__(self) -> None:
        super().__init__("The policy was closed.")


class _HeldLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while another thread holds it."""

    held = 0.0

    def time(self) -> float:
        return super().time() - self.held


class Loop:
    """An event loop in a thread of its own, in which connections outlive the callers' loops.

    >>> loop = Loop("example")
    >>> loop.run(asyncio.sleep(0, "done"))
    'done'
    >>> loop.stop()

    Args:
        name: the thread's.
        patience: seconds that what is still running at the end may take to clean up; None: as long as it takes.
    """

    def __init__(self, name: str, patience: float | None = None) -> None:
        self._loop = _HeldLoop()
        self._patience = patience
        self.stopped = self._halted = False
        self._door = threading.Lock()
        self._last: Callable[[], Coroutine[Any, Any, None]] | None = None
        self.thread = Thread(self._run, name=name)
        self.thread.start()

    @property
    def inside(self) -> bool:
        """Whether the caller runs in it."""
        return threading.current_thread() is self.thread

    @contextlib.contextmanager
    def waiting_for(self, lock: threading.Lock) -> Iterator[None]:
        """Holds a lock; no deadline in the loop comes nearer while the loop itself waits for it."""
        began = None if lock.acquire(blocking=False) else time.monotonic()
        if began is not None:
            lock.acquire()
            self._loop.held += (time.monotonic() - began) * self.inside
        try:
            yield
        finally:
            lock.release()

    async def ask(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine`, run there, returns to a caller in another loop; cancelling the caller cancels it.

        Raises:
            Stopped: the loop was stopped, before or meanwhile.
        """
        try:
            return await asyncio.wrap_future(self.submit(coroutine))
        except asyncio.CancelledError:
            if self.stopped and not cancelled():
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
            while not self._halted:
                with contextlib.suppress(*ENDING):
                    self._loop.run_forever()
            self._end_tasks()
            if self._last is not None:
                self._finish(self._last())
        finally:
            self._loop.close()

    def _end_tasks(self) -> None:
        """Cancels what is still running, and what that begins, and lets it clean up."""
        while left := asyncio.all_tasks(self._loop):
            for task in left:
                task.cancel()
            ended, late = self._finish(asyncio.wait(left, timeout=self._patience))
            for task in ended:
                if not task.cancelled():
                    task.exception()  # seen: nobody else will ask
            if late:
                break

    def _finish(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs `coroutine` to its end, and its end alone."""
        task = self._loop.create_task(coroutine)
        while not task.done():
            with contextlib.suppress(*ENDING):
                self._loop.run_until_complete(task)
        return task.result()
