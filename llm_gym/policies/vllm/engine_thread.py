"""One thread that owns a vLLM engine: requests and calls go in by a queue, completions come out by event loops.

Knows the engine only by its methods (`add_request`, `abort_request`, `step`, `has_unfinished_requests`), and the
futures and event loops of those who wait.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from llm_gym.concurrency import Thread
from llm_gym.core import Completion
from llm_gym.errors import PolicyError

Outcome = Completion | PolicyError


@dataclass(eq=False, slots=True)
class Request:
    """A completion under way; once submitted, only the engine's thread touches it."""

    name: str
    add: Callable[[Any], Any]
    """Adds it to the engine; returns vLLM's state of the request, which knows how many tokens it has."""
    future: asyncio.Future[Completion]
    loop: asyncio.AbstractEventLoop
    version: int = 0
    """Version of the weights that sampled its first token."""
    updates: list[tuple[int, int]] = field(default_factory=list)
    """(index of the first token, version) of every update since."""
    state: Any = None

    def update(self, version: int) -> None:
        """Notes that every token from here on is sampled by the weights of `version`."""
        tokens = self.state.detokenizer.num_output_tokens()
        self.updates = [update for update in self.updates if update[0] < tokens]
        if tokens:
            self.updates.append((tokens, version))
        else:
            self.version = version


class EngineThread:
    """Runs an engine until `close`, or until it fails.

    Args:
        make: builds the engine, in the new thread.
        finish: a vLLM output and its request -> the completion.

    Raises:
        Exception: what `make` raised. A `KeyboardInterrupt` while it runs ends the thread before it is passed on.
    """

    def __init__(self, make: Callable[[], Any], finish: Callable[[Any, Request], Completion]) -> None:
        self.requests: dict[str, Request] = {}
        self.asleep = False
        """Set while the engine's memory is given away: nothing is decoded."""
        self.finish = finish
        self.calls: queue.SimpleQueue[Request | tuple[Callable[[Any], Any] | None, Future[Any]]] = queue.SimpleQueue()
        self._gathered: dict[asyncio.AbstractEventLoop, list[Request]] = defaultdict(list)
        self._ended = False
        self._building, self._door = True, threading.Lock()
        ready: Future[Any] = Future()
        self._thread = Thread(self._serve, args=(make, ready), name="vllm-engine")
        _running.add(self)
        try:
            self._thread.start()
            self.engine = ready.result()
        except BaseException as error:
            self.stop(error)
            raise

    def submit(self, request: Request) -> None:
        """Hands in a request; its future is resolved in its own event loop.

        Those of one turn of the event loop go in together: an engine that started on the first would take the
        interpreter from whoever prepares the others, and decode them a step later.
        """
        gathered = self._gathered[request.loop]
        gathered.append(request)
        if len(gathered) == 1:
            request.loop.call_soon(self._hand_in, request.loop)

    def _hand_in(self, loop: asyncio.AbstractEventLoop) -> None:
        for request in self._gathered.pop(loop):
            if not request.future.done():  # cancelled meanwhile
                self.calls.put(request)
        self._refuse_if_ended()

    def abort(self, request: Request) -> None:
        """Forgets a request whose caller no longer waits."""

        def stop(engine: Any) -> None:
            if self.requests.pop(request.name, None):
                engine.abort_request([request.name])

        self.call(stop)

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        """Runs `function(engine)` on the engine's thread, between two steps."""
        future: Future[Any] = Future()
        self.calls.put((function, future))
        self._refuse_if_ended()
        return future

    def close(self) -> None:
        """Ends the thread; requests still running fail with `PolicyError`."""
        self.calls.put((None, Future()))
        self._thread.join()
        _running.discard(self)

    def stop(self, error: BaseException) -> None:
        """Ends a thread that may still be building its engine."""
        while self._thread.is_alive():
            with self._door:
                if self._building and not isinstance(error, Exception):  # Ctrl-C reaches the main thread only
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(KeyboardInterrupt)
                    )
            self.calls.put((None, Future()))
            self._thread.join(timeout=1)
        _running.discard(self)

    def _refuse_if_ended(self) -> None:
        if self._ended:  # looked at after the call was put: either the thread takes it, or it is refused here
            self._refuse(PolicyError("The vLLM engine has ended."))

    def _refuse(self, error: PolicyError) -> None:
        """Fails every call and request that nobody will serve any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                item = self.calls.get_nowait()
                if isinstance(item, Request):
                    self.requests[item.name] = item
                elif not item[1].done():
                    item[1].set_exception(error)
        self._settle([(request, error) for request in list(self.requests.values())])

    def _serve(self, make: Callable[[], Any], ready: Future[Any]) -> None:
        """The engine's thread: takes calls, decodes a step, hands out what is finished."""
        engine, ended = None, PolicyError("The vLLM engine has ended.")
        try:
            engine = self._build(make)
            ready.set_result(engine)
            while self._take(engine):
                self.step(engine)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            ended = PolicyError(f"vLLM failed: {type(error).__name__}: {error}")
        finally:
            self._ended = True
            self._refuse(ended)
            if engine is not None:
                engine.engine_core.shutdown()

    def _build(self, make: Callable[[], Any]) -> Any:
        """What `make` gives; only here may the thread be interrupted: its end would be left half done."""
        try:
            return make()
        finally:
            with self._door:
                self._building = False

    def step(self, engine: Any) -> None:
        """One decoding step; on the engine's thread only."""
        done: list[tuple[Request, Outcome]] = []
        for output in engine.step():
            if output.finished and (request := self.requests.get(output.request_id)) is not None:
                done.append((request, self.finish(output, request)))
        self._settle(done)

    def _take(self, engine: Any) -> bool:
        """Runs the calls that wait; blocks while there is nothing to decode. False: the end."""
        while True:
            try:
                item = self.calls.get(block=self.asleep or not engine.has_unfinished_requests())
            except queue.Empty:
                return True
            if isinstance(item, Request):
                self._add(engine, item)
                continue
            function, future = item
            if function is None:
                return False
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(engine))
            except Exception as error:
                future.set_exception(error)

    def _add(self, engine: Any, request: Request) -> None:
        self.requests[request.name] = request
        try:
            request.state = request.add(engine)
        except Exception as error:
            self._settle([(request, PolicyError(f"vLLM refused a request: {error}"))])

    def _settle(self, done: list[tuple[Request, Outcome]]) -> None:
        """Resolves futures, those of one event loop in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Request, Outcome]]] = defaultdict(list)
        for request, outcome in done:
            self.requests.pop(request.name, None)  # once the thread has ended, several callers may be refused at once
            by_loop[request.loop].append((request, outcome))
        for loop, some in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                loop.call_soon_threadsafe(_resolve, some)


def _resolve(done: list[tuple[Request, Outcome]]) -> None:
    for request, outcome in done:
        if request.future.done():
            continue
        if isinstance(outcome, PolicyError):
            request.future.set_exception(outcome)
        else:
            request.future.set_result(outcome)


_running: weakref.WeakSet[EngineThread] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """An engine in mid-step while the interpreter is taken down would crash it."""
    for thread in list(_running):
        thread.close()
