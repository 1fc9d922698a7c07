"""The thread that owns an engine, with one that does nothing; real ones run in tests/heavy."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_gym.policies.vllm.engine_thread import EngineThread


class Idle:
    """An engine without requests, whose end takes its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.engine_core, self.seconds, self.ended = self, seconds, False

    def has_unfinished_requests(self) -> bool:
        return False

    def step(self) -> list[Any]:
        return []

    def shutdown(self) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            time.sleep(0.01)
        self.ended = True


def finish(output: Any, request: Any) -> Any:
    raise AssertionError


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    made = EngineThread(Idle, finish)
    yield made
    made.close()


def test_a_call_that_nobody_waits_for_any_more_is_left_out(thread: EngineThread) -> None:
    """And the next one is served: a caller that was cancelled is no end of the engine."""
    begin, ran = threading.Event(), list[str]()
    first = thread.call(lambda engine: begin.wait())
    second = thread.call(lambda engine: ran.append("second"))
    assert second.cancel()
    begin.set()
    assert thread.call(lambda engine: 5).result(timeout=60) == 5
    assert first.result()
    assert ran == []


def test_ctrl_c_after_it_was_built_leaves_the_engine_its_time_to_end() -> None:
    engine = Idle(seconds=2.5)
    thread = EngineThread(lambda: engine, finish)
    thread.stop(KeyboardInterrupt())
    assert engine.ended


def test_ctrl_c_while_it_is_built_ends_that() -> None:
    """Also if what is built swallows the first one."""
    interrupted = list[int]()

    def make() -> Any:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while len(interrupted) < 2:
            try:
                while True:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                interrupted.append(1)
        return Idle()

    with pytest.raises(KeyboardInterrupt):
        EngineThread(make, finish)
    assert len(interrupted) == 2
