"""Coroutines run to their end by code that is not asynchronous, and Ctrl-C at bad moments."""

from __future__ import annotations

import asyncio

import pytest

from llm_gym.concurrency import Thread, run_here


async def answer() -> int:
    return 42


async def inside() -> int:
    """From within a loop, as in Jupyter: the coroutine gets another one, in a thread."""
    return run_here(answer())


def test_the_result_comes_back_with_and_without_a_running_loop() -> None:
    assert run_here(answer()) == 42
    assert asyncio.run(inside()) == 42


def test_ctrl_c_when_the_thread_has_just_ended_is_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to cancel any more; the loop is closed."""
    interrupted = list[int]()

    class Late(Thread):
        def join(self, timeout: float | None = None) -> None:
            super().join(timeout)
            if not interrupted:
                interrupted.append(1)
                raise KeyboardInterrupt

        def is_alive(self) -> bool:
            return True

    monkeypatch.setattr("llm_gym.concurrency.loops.Thread", Late)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(inside())
