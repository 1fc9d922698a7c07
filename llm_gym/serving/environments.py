"""Environments as a service: OpenEnv's protocol, at the level of text, many sessions on one connection.

WebSocket `/ws`: `{"type": "reset" | "step" | "state" | "close", "data": {...}}`, answered by `{"type": "observation" |
"state" | "error", "data": {...}}`. A message may name a `session`; the answer then names it too, and sessions do not
wait for each other. Without it the connection is the session, as OpenEnv has it. `POST /reset` and `/step` are for a
look by hand; `/health`, `/schema` and `/metadata` say what is here.

Texts go in and out; tokens, chat template and their limits are the client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import WSMsgType, web

from llm_gym import envs
from llm_gym.access import HOST, checked_token, from_a_page, lacks, url_of
from llm_gym.concurrency import Loop
from llm_gym.errors import (
    FAULTS,
    ConfigError,
    RewardError,
    SettingError,
    ToolFailure,
    check_counts,
    described,
    ended,
)
from llm_gym.rollouts.env_pool import Env, EnvPool, EnvSlot
from llm_gym.serving.episodes import Data, Player, Problem, by_text, schemas

DANGER = "play in its environments, and run what their tools run"
OPEN = ("/health",)
"""Routes that need no token: they say nothing but that the server is there."""
LARGEST = 64 << 20
"""Bytes of a message."""
PATIENCE = 10.0
"""Seconds that what is under way at the end may take to clean up."""
NO_STATE: Data = {"episode_id": None, "step_count": 0}
STATUS = {"CAPACITY_REACHED": 503, "EXECUTION_ERROR": 500}
"""HTTP statuses of errors; of all others 422."""
KINDS = (SettingError, ToolFailure, RewardError)
"""What our own client raises again as what it was."""


@dataclass(eq=False)
class Session:
    """One environment, or the promise of one, and who plays in it."""

    home: dict[str, Session]
    name: str
    used: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    slot: EnvSlot | None = None
    player: Player | None = None
    busy: asyncio.Task[Any] | None = None


class EnvDoor:
    """A server of one kind of environment, in a thread of its own; `with` ends it, and `url` is where it is.

    >>> with EnvDoor("GuessNumber-v0", port=0) as server:
    ...     server.url.startswith("http://127.0.0.1:")
    True

    Args:
        env: an id, short or full, or a callable that makes an environment, which must be a `TextEnv`.
        env_args: its keyword arguments.
        host: the address to listen on.
        port: 0: a free one.
        token: what requests must bear where others than this machine reach the server; None: the LLM_GYM_TOKEN of the
            environment.
        max_sessions: most sessions at once; further ones are refused.
        idle: seconds after the last message of a session when it ends.

    Raises:
        SettingError: the environment cannot be made or is none of text, the port cannot be had, or a token is missing.
    """

    def __init__(
        self,
        env: str | Callable[..., Env],
        *,
        env_args: Mapping[str, Any] | None = None,
        host: str = HOST,
        port: int = 8100,
        token: str | None = None,
        max_sessions: int = 1024,
        idle: float = 3600.0,
    ) -> None:
        check_counts({"max_sessions": max_sessions})
        if not idle > 0:
            raise ConfigError(f"idle: got {idle!r}, want seconds, more than 0.")
        self._token = checked_token(host, token, DANGER)
        self.max_sessions, self.idle = max_sessions, idle
        self._make, self._args = env, dict(env_args or {})
        self.name = envs.resolve(env) if isinstance(env, str) else getattr(env, "__name__", type(env).__name__)
        self._pool = EnvPool(self._made, {}, self.name)
        self._about: Data = {}
        self._sessions: set[Session] = set()
        self._posted: dict[str, Session] = {}
        self._over = threading.Event()
        self._loop = Loop("llm_gym-serving", PATIENCE)
        try:
            self.port = self._loop.run(self._start(host, port))
        except BaseException:
            self.close()
            raise
        self.url = url_of(host, self.port)

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    def wait(self) -> None:
        """Waits until it is closed."""
        self._over.wait()

    def close(self) -> None:
        """Ends every session and the server; may be repeated."""
        self._over.set()
        self._loop.stop(self._end_all)

    def __enter__(self) -> EnvDoor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Begin and end

    def _made(self) -> Env:
        env = envs.make(self._make, **self._args) if isinstance(self._make, str) else self._make(**self._args)
        self._about = by_text(env)
        return env

    async def _start(self, host: str, port: int) -> int:
        """Makes the first environment, then listens; the port."""
        self._pool.leave(await self._pool.take(), broken=False)
        app = web.Application(middlewares=[self._guard], client_max_size=LARGEST)
        app.router.add_get("/ws", self._connection)
        for path, answer in (("/health", self._health), ("/schema", self._schema), ("/metadata", self._metadata)):
            app.router.add_get(path, answer)
        app.router.add_get("/state", self._no_state)
        app.router.add_post("/reset", self._post_reset)
        app.router.add_post("/step", self._post_step)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handle_signals=False)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except (OSError, OverflowError) as error:
            where = "" if host == HOST else f" on {host}"
            raise SettingError(f"--port: cannot use {port}{where}: {ended(error)}") from error
        self._reaper = asyncio.create_task(self._end_idle())
        return int(self._runner.addresses[0][1])

    async def _end_all(self) -> None:
        for session in list(self._sessions):
            self._end(session)
        if hasattr(self, "_runner"):
            await self._runner.cleanup()
        self._pool.close()

    # Sessions

    def _session(self, home: dict[str, Session], name: str) -> Session:
        """The session of this name, or a new one.

        Raises:
            Problem: there are as many as there may be.
        """
        if name in home:
            return home[name]
        most = self.max_sessions
        if len(self._sessions) >= most:
            text = f"The server is full: {most} of {most} sessions are open; raise its --max-sessions, or play fewer."
            raise Problem("CAPACITY_REACHED", text, active_sessions=most, max_sessions=most)
        session = home[name] = Session(home, name, self._now())
        self._sessions.add(session)
        return session

    def _end(self, session: Session) -> None:
        """Forgets a session; its environment is closed at once, or when the call under way in it has been cancelled."""
        self._sessions.discard(session)
        session.home.pop(session.name, None)
        if session.busy is not None:
            session.busy.cancel()
        else:
            self._close(session)

    def _close(self, session: Session) -> None:
        slot, session.slot = session.slot, None
        if slot is not None:
            self._pool.leave(slot, broken=True)

    async def _end_idle(self) -> None:
        while True:
            await asyncio.sleep(min(self.idle / 4, 30.0))
            since = self._now() - self.idle
            for session in [s for s in self._sessions if s.busy is None and s.used < since]:
                self._end(session)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # Messages

    async def _play(self, session: Session, kind: str, data: Data) -> Data:
        """What a message of a session comes to; messages of one session wait for each other."""
        async with session.lock:
            if session not in self._sessions:
                raise Problem("SESSION_ERROR", f"{kind}: the session has ended.")
            session.busy = asyncio.current_task()
            try:
                if session.player is None:
                    session.slot = await self._pool.take()
                    session.player = Player(session.slot)
                return await (session.player.reset(data) if kind == "reset" else session.player.step(data))
            finally:
                session.busy, session.used = None, self._now()
                if session not in self._sessions:
                    self._close(session)

    async def _told(self, home: dict[str, Session], name: str, kind: Any, data: Any) -> Data:
        """The data of the answer to a message.

        Raises:
            Problem: there is none.
        """
        if kind not in ("reset", "step", "state"):
            raise Problem("UNKNOWN_TYPE", f"Unknown message type: {kind!r:.80}; valid: reset, step, state, close.")
        if not isinstance(data, dict):
            raise Problem("VALIDATION_ERROR", f"{kind}: got {data!r:.80} as data, want an object.")
        if kind == "state" and name not in home:
            return NO_STATE
        if kind == "step" and name not in home:
            raise Problem("SESSION_ERROR", "step: there is no such session, or it has ended; send a reset first.")
        try:
            session = self._session(home, name)
            if kind == "state":
                return session.player.state() if session.player is not None else NO_STATE
            return await self._play(session, kind, data)
        except Problem:
            raise
        except FAULTS as error:
            kinds = [one for one in KINDS if isinstance(error, one)]
            more = {"kind": kinds[0].__name__} if kinds else {}
            text = str(error) if kinds else described(error)
            raise Problem("EXECUTION_ERROR", text, **more) from error

    async def _answer(self, home: dict[str, Session], message: Data) -> str:
        """The answer to a message as text."""
        kind = message.get("type")
        name = str(message.get("session") or "")
        more = {"session": name} if name else {}
        try:
            data = await self._told(home, name, kind, message.get("data") or {})
            return json.dumps({"type": "state" if kind == "state" else "observation", "data": data, **more})
        except Problem as problem:
            return json.dumps({"type": "error", "data": problem.data, **more})
        except (TypeError, ValueError) as error:  # an environment's message that JSON has no words for
            data = {"message": f"{self.name}: {ended(error)}", "code": "EXECUTION_ERROR"}
            return json.dumps({"type": "error", "data": data, **more})

    async def _connection(self, request: web.Request) -> web.WebSocketResponse:
        """A WebSocket, and the sessions on it, which end with it."""
        socket_ = web.WebSocketResponse(max_msg_size=LARGEST, compress=False)
        await socket_.prepare(request)
        _keep_alive(request)
        home: dict[str, Session] = {}
        tasks: set[asyncio.Task[None]] = set()

        async def answer(some: list[Data]) -> None:
            texts = [await self._answer(home, message) for message in some]
            with contextlib.suppress(ConnectionError):  # nobody is there to hear it
                await socket_.send_str(texts[0] if len(texts) == 1 else f"[{','.join(texts)}]")

        try:
            async for some in _messages(socket_):
                for closing in [message for message in some if message.get("type") == "close"]:
                    some.remove(closing)
                    name = str(closing.get("session") or "")
                    if name in home:
                        self._end(home[name])
                    if not name:
                        return socket_
                if self._pool.way == "inline" and some:
                    await answer(some)
                    continue
                for message in some:
                    task = asyncio.create_task(answer([message]))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        finally:
            for session in list(home.values()):
                self._end(session)
            await socket_.close()
        return socket_

    # HTTP

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[..., Awaitable[Any]]) -> Any:
        wrong = request.path not in OPEN and lacks(request.headers.get("Authorization", ""), self._token)
        if wrong:
            text = f"{wrong}; send it as `Authorization: Bearer TOKEN`"
            return web.json_response({"detail": text}, status=401, headers={"WWW-Authenticate": "Bearer"})
        if from_a_page(request.headers, self._token):
            return web.json_response({"detail": "pages in a browser are not answered"}, status=403)
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "healthy"})

    async def _schema(self, request: web.Request) -> web.Response:
        full = self.sessions >= self.max_sessions
        return web.json_response({**schemas(), "llm_gym": {**self._about, "env": self.name, "full": full}})

    async def _metadata(self, request: web.Request) -> web.Response:
        return web.json_response({"name": self.name, "description": f"{self.name} of llm_gym, played by text."})

    async def _no_state(self, request: web.Request) -> web.Response:
        return web.json_response(NO_STATE)

    async def _post_reset(self, request: web.Request) -> web.Response:
        """A reset; its episode goes on by `/step` if it is given an `episode_id`."""
        return await self._post(request, "reset", lambda body: body)

    async def _post_step(self, request: web.Request) -> web.Response:
        return await self._post(request, "step", lambda body: body.get("action"))

    async def _post(self, request: web.Request, kind: str, data: Callable[[Data], Any]) -> web.Response:
        try:
            body = await request.json() if request.can_read_body else {}
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return web.json_response({"detail": f"{kind}: the body is no JSON object."}, status=422)
        name = str(body.get("episode_id") or "")
        home = self._posted if name else {}
        try:
            told = await self._told(home, name, kind, data(body))
        except Problem as problem:
            code = problem.data["code"]
            return web.json_response({"detail": problem.data["message"], "code": code}, status=STATUS.get(code, 422))
        finally:
            if not name and "" in home:
                self._end(home[""])
        if told["done"] and name in home:
            self._end(home[name])
        return web.json_response(told)


async def _messages(socket_: web.WebSocketResponse) -> AsyncIterator[list[Data]]:
    """The messages of a connection, one or a list at a time; what is none is answered with an error."""
    async for message in socket_:
        if message.type is not WSMsgType.TEXT:
            continue
        try:
            found = json.loads(message.data)
        except ValueError as error:
            found = str(error)
        some = found if isinstance(found, list) else [found]
        if some and all(isinstance(each, dict) for each in some):
            yield some
        else:
            text = f"Invalid JSON: want an object such as {{'type': 'reset', 'data': {{}}}}, got {found!r:.80}."
            await socket_.send_json({"type": "error", "data": {"message": text, "code": "INVALID_JSON"}})


def _keep_alive(request: web.Request) -> None:
    """Has the kernel ask whether a silent client is still there: its own loop may stand still while a model learns."""
    found = request.transport.get_extra_info("socket") if request.transport else None
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):  # not on every system
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
