"""HTTP failures: which may pass, what they say, and how long to wait."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.concurrency import FIRST, LONGEST, Loop, delay
from llm_gym.errors import PolicyError
from llm_gym.policies import http
from llm_gym.policies.http import Remote, RemoteError, message

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_delays_lie_between_half_and_all_of_a_doubling_bound(attempt: int, fraction: float) -> None:
    bound = min(LONGEST, FIRST * 2.0 ** min(attempt, 100))
    assert bound / 2 <= delay(attempt, fraction) <= bound
    assert bound / 2 <= delay(attempt) <= bound


def answer(handler: Handler, **options: float) -> object:
    """What `Remote.call` makes of a real server with this handler."""

    async def run() -> object:
        app = web.Application()
        app.router.add_route("*", "/x", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        http = Remote(f"http://127.0.0.1:{runner.addresses[0][1]}/")
        try:
            return await http.call("POST", "/x", {"a": 1}, **options)
        finally:
            await http.close()
            await runner.cleanup()

    return asyncio.run(run())


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"got": await request.json()})


async def empty(request: web.Request) -> web.Response:
    return web.Response()


async def drop(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def half(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b'{"a": ')
    assert request.transport is not None
    request.transport.abort()
    return response


async def garbage(request: web.Request) -> web.Response:
    return web.Response(text="<html>502 Bad Gateway</html>")


async def hang(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


def fails(status: int) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "the engine\nis dead", "code": status}}, status=status)

    return handler


def test_json_comes_back() -> None:
    assert answer(echo) == {"got": {"a": 1}}
    assert answer(empty) is None


@pytest.mark.parametrize("handler", [drop, half, garbage])
def test_no_readable_answer_may_pass(handler: Handler) -> None:
    with pytest.raises(RemoteError) as caught:
        answer(handler)
    assert caught.value.passing
    assert caught.value.status is None


def test_a_server_that_hangs_is_given_up() -> None:
    with pytest.raises(RemoteError, match="in time") as caught:
        answer(hang, seconds=0.2)
    assert caught.value.passing


@pytest.mark.parametrize(("status", "passing"), [(500, True), (503, True), (429, True), (400, False), (404, False)])
def test_only_the_servers_own_errors_may_pass(status: int, passing: bool) -> None:
    with pytest.raises(RemoteError, match=f"answered {status}: the engine is dead$") as caught:
        answer(fails(status))
    assert (caught.value.status, caught.value.passing) == (status, passing)


def test_nobody_there_may_pass() -> None:
    async def run() -> None:
        http = Remote("http://127.0.0.1:1")
        try:
            await http.call("GET", "/health")
        finally:
            await http.close()

    with pytest.raises(RemoteError) as caught:
        asyncio.run(run())
    assert caught.value.passing


@pytest.mark.parametrize(("kept", "connections"), [(60.0, 1), (0.01, 2)])
def test_an_idle_connection_is_not_used_when_the_server_may_be_closing_it(
    monkeypatch, kept: float, connections: int
) -> None:
    """vLLM closes one that was idle for 5 s; a request that is on its way then has no answer."""
    assert http.KEPT < 5
    monkeypatch.setattr(http, "KEPT", kept)
    seen: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.transport)
        return web.Response()

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/x", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        caller = Remote(f"http://127.0.0.1:{runner.addresses[0][1]}")
        for _ in range(2):
            await caller.call("POST", "/x", {})
            time.sleep(0.02)
        await caller.close()
        await runner.cleanup()

    asyncio.run(run())
    assert len(set(map(id, seen))) == connections


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "no", "code": 4}}', "no"),
        ('{"message": "no"}', "no"),
        ('{"detail": [{"msg": "field required"}]}', "[{'msg': 'field required'}]"),
        ('{"detail": {"error": "no"}}', "no"),
        ("Internal Server Error", "Internal Server Error"),
        ('["a"]', "['a']"),
        ("{}", "{}"),
        ("", "nothing"),
    ],
)
def test_the_message_of_an_error(body: str, said: str) -> None:
    assert message(body) == said


class TestLoop:
    def test_results_and_errors_come_back(self) -> None:
        loop = Loop("test")

        async def fail() -> None:
            raise KeyError("x")

        assert loop.run(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(KeyError):
            loop.run(fail())
        loop.stop()

    def test_stopping_cancels_what_runs_and_lets_it_clean_up(self) -> None:
        loop, events = Loop("test"), list[str]()

        async def forever() -> None:
            events.append("started")
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                events.append("cleaned up")

        async def caller() -> None:
            asked = asyncio.ensure_future(loop.ask(forever()))
            while not events:
                await asyncio.sleep(0)
            loop.stop()
            with pytest.raises(PolicyError, match="closed"):
                await asked

        asyncio.run(caller())
        loop.stop()
        assert events == ["started", "cleaned up"]

    def test_a_cancelled_caller_is_cancelled_and_nothing_is_said(self, caplog: pytest.LogCaptureFixture) -> None:
        """Also if the loop is stopped before it could cancel: nobody is left to hear of that."""
        loop, hold, ended = Loop("test"), threading.Event(), list[asyncio.CancelledError]()
        begun = threading.Event()

        async def busy() -> None:
            hold.wait()

        async def forever() -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as error:
                ended.append(error)
                raise

        async def caller() -> None:
            asked = asyncio.ensure_future(loop.ask(forever()))
            blocking = asyncio.ensure_future(loop.ask(busy()))
            await asyncio.to_thread(begun.wait)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            threading.Timer(0.0, hold.set).start()
            loop.stop()
            await asyncio.gather(blocking, return_exceptions=True)

        asyncio.run(caller())
        gc.collect()
        assert len(ended) == 1
        assert not caplog.records

    def test_what_comes_in_while_it_is_stopped_ends_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A caller that found it running, and is slow to hand in: nobody would serve it, and it would wait for ever."""
        loop, submit, inside = Loop("test"), asyncio.run_coroutine_threadsafe, threading.Event()

        async def forever() -> None:
            await asyncio.Event().wait()

        def slowly(coroutine: Any, into: asyncio.AbstractEventLoop) -> Any:
            inside.set()
            loop.thread.join(0.5)
            return submit(coroutine, into)

        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", slowly)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(loop.run, forever())
            inside.wait()
            loop.stop()
            with pytest.raises(PolicyError, match="closed"):
                asked.result(timeout=60)

    def test_what_is_last_runs_when_nothing_else_does(self) -> None:
        loop, events = Loop("test"), list[str]()

        async def forever() -> None:
            events.append("started")
            try:
                await asyncio.Event().wait()
            finally:
                events.append("ended")

        async def last() -> None:
            events.append("last")

        loop.submit(forever())
        loop.stop(last)
        loop.stop(last)
        assert events[-2:] == ["ended", "last"] or events == ["last"], "it may have ended before it began"

    def test_a_stopped_loop_refuses(self) -> None:
        loop = Loop("test")
        loop.stop()
        with pytest.raises(PolicyError, match="closed"):
            loop.run(asyncio.sleep(0))
