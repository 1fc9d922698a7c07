"""A loop in a thread of its own: what ends one task ends no other, and nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from llm_gym.concurrency import Loop


async def fails(error: BaseException) -> None:
    await asyncio.sleep(0)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt("mine"), SystemExit("mine"), GeneratorExit("mine")])
def test_what_a_task_raises_is_its_callers_and_the_loop_goes_on(error: BaseException) -> None:
    loop, gate = Loop("test"), asyncio.Event()

    async def waits() -> str:
        await gate.wait()
        return "done"

    async def opens() -> None:
        gate.set()

    other = loop.submit(waits())
    with pytest.raises(type(error), match="mine"):
        loop.submit(fails(error)).result(20)
    loop.submit(opens()).result(20)
    assert other.result(20) == "done"
    loop.stop()
    assert not loop.thread.is_alive()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_a_task_raises_as_it_is_cancelled_leaves_no_other_behind(kind: type[BaseException]) -> None:
    loop, cleaned = Loop("test"), list[str]()
    begun = [asyncio.Event() for _ in range(2)]

    async def bad() -> None:
        try:
            begun[0].set()
            await asyncio.Event().wait()
        finally:
            raise kind("mine")

    async def good() -> None:
        try:
            begun[1].set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("good")

    async def both() -> None:
        for event in begun:
            await event.wait()

    futures = [loop.submit(bad()), loop.submit(good())]
    loop.submit(both()).result(20)
    loop.stop()
    assert cleaned == ["good"]
    assert all(future.done() for future in futures)
