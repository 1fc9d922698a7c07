"""Connections to OpenEnv servers: one carries every session of a server of ours; of others, each session has its own.

All of a process's connections to one server live in an event loop of their own, so that they hold while rollouts pause;
whoever asks may do so in any loop or thread. Messages cross from one to the other by the handful.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import json
import os
import threading
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from llm_gym.access import TOKEN, bearing, token_of
from llm_gym.concurrency import Loop
from llm_gym.errors import ConfigError, LLMGymError, described, ended

Data = dict[str, Any]
Box = deque[tuple[asyncio.Future[Data], Data]]
"""Answers on their way to who waits for them."""
TOGETHER = 64
"""Messages that a server of ours is sent as one list; it answers them together if none of them waits."""
SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


class Lost(LLMGymError):
    """No answer: the connection has ended, or it took too long."""


class Refused(LLMGymError):
    """An answer that is an error; `data` holds its code, and what more the server says."""

    def __init__(self, text: str, data: Data) -> None:
        super().__init__(text)
        self.data = data


class Connection:
    """One WebSocket. `ask` and `tell` may be called in any loop and thread, for many sessions at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self.lost = ""
        """Why it has ended; empty while it has not."""
        self._farewell = ""
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[Data]]] = {}
        self._out: deque[str] = deque()
        self._flushing = False
        self._in: WeakKeyDictionary[asyncio.AbstractEventLoop, Box] = WeakKeyDictionary()
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connects; runs in the server's loop.

        Raises:
            Lost: that failed.
        """
        try:
            self._socket = await self._server.http.ws_connect(f"{self._server.url}/ws", max_msg_size=0, compress=0)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self.lost = f"{self._server.url} cannot be reached: {ended(described(error))}"
            raise Lost(self.lost) from error
        self._reader = asyncio.create_task(self._read(self._socket))

    async def ask(self, kind: str, data: Data, session: str = "") -> Data:
        """The data of the answer to a message; a session has one on its way at a time.

        Raises:
            Lost: there is none.
            Refused: it is an error.
        """
        here = asyncio.get_running_loop()
        future: asyncio.Future[Data] = here.create_future()
        self._waiting[session] = here, future
        self.tell(kind, data, session)
        clock = here.call_later(self._server.seconds, _late, future, self._server)
        try:
            if self.lost:  # looked at last: whoever ends the connection tells those who wait, after saying that it has
                raise Lost(self.lost)
            answer = await future
        finally:
            clock.cancel()
            future.cancel()  # no answer to it is looked for any more
            self._waiting.pop(session, None)
        if answer.get("type") == "error":
            found = answer.get("data") or {}
            raise Refused(str(found.get("message") or found), found)
        return answer.get("data") or {}

    def tell(self, kind: str, data: Data, session: str = "") -> None:
        """Sends a message, soon."""
        self._out.append(json.dumps({"type": kind, "data": data, **({"session": session} if session else {})}))
        if not self._flushing:
            self._flushing = True
            with contextlib.suppress(LLMGymError):  # the loop has ended: so has the connection
                self._server.loop.submit(self._flush())

    async def close(self) -> None:
        """Ends it."""
        if self._reader is not None:
            await self._flush()
            self._reader.cancel()
            await asyncio.wait([self._reader])

    async def _flush(self) -> None:
        self._flushing = False  # first: what comes after the last look below begins another
        while self._out and not self.lost and self._socket is not None:
            some = [self._out.popleft() for _ in range(min(len(self._out), TOGETHER if self._server.own else 1))]
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):  # the reader hears of it too
                await self._socket.send_str(some[0] if len(some) == 1 else f"[{','.join(some)}]")

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    found = json.loads(message.data)
                    for answer in found if isinstance(found, list) else [found]:
                        self._deliver(answer.get("session", ""), answer)
        finally:
            self.lost = self._farewell or f"{self._server.url} has ended the connection, or is gone."
            for session in list(self._waiting):
                self._deliver(session, {"type": "lost"})
            await socket.close()

    def _deliver(self, session: str, answer: Data) -> None:
        """Hands an answer to who waits for it, in their loop."""
        entry = self._waiting.pop(session, None)
        if entry is None:
            if answer.get("type") == "error":  # said before it was asked: a server that is full, and hangs up
                self._farewell = f"{self._server.url}: {ended((answer.get('data') or {}).get('message'))}"
            return
        loop, future = entry
        box = self._in.setdefault(loop, deque())
        box.append((future, answer))
        if len(box) == 1:
            with contextlib.suppress(RuntimeError):  # their loop has ended
                loop.call_soon_threadsafe(self._settle, box)

    def _settle(self, box: Box) -> None:
        while box:
            future, answer = box[0]
            if not future.done():
                if answer.get("type") == "lost":
                    future.set_exception(Lost(self.lost))
                else:
                    future.set_result(answer)
            box.popleft()


def _late(future: asyncio.Future[Data], server: Server) -> None:
    if not future.done():
        future.set_exception(Lost(f"{server.url} gave no answer within {server.seconds:g} seconds."))


class Server:
    """A server, what it says of itself, and the connection to it that the environments of this process share.

    Made by `enter`, and ended by as many calls of `leave`.

    Args:
        url: where it is.
        token: what it asks for; None: the LLM_GYM_TOKEN of the environment, shown only to a server that asks for one.
        seconds: in which it must answer.

    Raises:
        ConfigError: no URL, nothing that answers there, a token that it does not take, or it is full.
    """

    def __init__(self, url: str, token: str | None, seconds: float) -> None:
        self.url, self.seconds = url, seconds
        self.loop = Loop("llm_gym-openenv", 5.0)
        self.names = itertools.count(1)
        self._users, self._shared = 0, Connection(self)
        self._opening = asyncio.Lock()
        try:
            self.schema = self.loop.run(self._begin(token))
        except BaseException:
            self.stop()
            raise
        self.own: Data | None = self.schema.get("llm_gym")
        """What a server of ours says of its environment."""

    @classmethod
    def enter(cls, url: str, token: str | None, seconds: float) -> Server:
        """The server at `url`, met once by all of a process's environments."""
        key = (_checked(url), token)
        with _DOOR:
            if key not in _SERVERS:
                _SERVERS[key] = cls(key[0], token, seconds)
            server = _SERVERS[key]
            server._users += 1
            return server

    def leave(self) -> None:
        """Lets go of it; the last one ends its connections."""
        with _DOOR:
            self._users -= 1
            if self._users == 0:
                for key in [key for key, server in _SERVERS.items() if server is self]:
                    del _SERVERS[key]
                self.stop()

    def stop(self) -> None:
        """Ends every connection, and the loop."""
        self.loop.stop(self._end)

    async def connected(self, *, shared: bool) -> Connection:
        """A connection that holds: the one that all share, made again if it was lost, or a new one.

        Raises:
            Lost: there is none to be had.
        """
        if shared and not self._shared.lost:
            return self._shared
        return await self.loop.ask(self._connected(shared))

    async def _connected(self, shared: bool) -> Connection:
        async with self._opening:
            if shared and not self._shared.lost:
                return self._shared
            made = Connection(self)
            await made.open()
            if shared:
                self._shared = made
            return made

    async def _begin(self, token: str | None) -> Data:
        """What the server says of itself; if it is one of ours, the shared connection stands."""
        found = await self._about(token or "")
        if isinstance(found, int) and token is None and token_of(None):
            found = await self._about(token_of(None))
        if isinstance(found, int):
            wrong = {401: f"asks for another token; give the right one as token, or set {TOKEN}"}
            raise ConfigError(f"url: the server at {self.url!r} {wrong.get(found, f'answers {found} to GET /schema')}.")
        own = found.get("llm_gym")
        if own is not None and own["full"]:
            raise ConfigError(f"url: the server at {self.url!r} is full: all sessions are open (its --max-sessions).")
        if own is not None:
            await self._shared.open()
        return found

    async def _about(self, token: str) -> Data | int:
        """The server's schema, or the HTTP status that refuses it."""
        await self._end()
        self.http = aiohttp.ClientSession(headers=bearing(token_of(token)))
        try:
            limits = aiohttp.ClientTimeout(total=min(self.seconds, 60.0), sock_connect=10.0)
            async with self.http.get(f"{self.url}/schema", timeout=limits) as answer:
                if answer.status != 200:
                    return answer.status
                found = await answer.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            why = " ".join(described(error).split())
            raise ConfigError(
                f"url: no server of OpenEnv answers at {self.url!r} ({why}); `llmgym serve-env` starts one."
            ) from error
        if not isinstance(found, dict) or not isinstance(found.get("action"), dict):
            raise ConfigError(f"url: what answers at {self.url!r} is no server of OpenEnv: its /schema has no action.")
        return found

    async def _end(self) -> None:
        if hasattr(self, "http"):
            await self._shared.close()
            await self.http.close()


_SERVERS: dict[tuple[str, str | None], Server] = {}
_DOOR = threading.Lock()


@atexit.register
def _stop() -> None:
    while _SERVERS:
        _SERVERS.popitem()[1].stop()


os.register_at_fork(after_in_child=_SERVERS.clear)  # the loop's thread is the parent's


def _checked(url: str) -> str:
    """The URL of a server's HTTP routes.

    Raises:
        ConfigError: it is none.
    """
    scheme, colon, rest = str(url).partition("://")
    if scheme not in SCHEMES or not colon or not rest:
        raise ConfigError(f"url: got {url!r}, want a URL such as 'http://127.0.0.1:8100'.")
    return f"{SCHEMES[scheme]}://{rest}".rstrip("/").removesuffix("/ws")
