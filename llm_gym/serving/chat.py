"""The chat door: an OpenAI-compatible endpoint in front of any policy, which keeps every token that was sampled.

    POST /v1/chat/completions    streamed or not; docs/agents.md says what is honoured, ignored and refused
    GET  /v1/models              the one model that there is
    GET  /health

Whoever asks says which session it is by the API key. A reply is recorded before it goes out, since the client may go on
from it at once, and is forgotten again if it does not arrive.
"""

from __future__ import annotations

import json
import logging
import secrets
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from llm_gym.access import HOST, url_of
from llm_gym.concurrency import Loop
from llm_gym.errors import described
from llm_gym.serving.chat_replies import chunks, whole
from llm_gym.serving.chat_requests import Refused, read_request
from llm_gym.serving.chat_sessions import ChatSession
from llm_gym.serving.visitors import Visitors

LARGEST = 64 << 20
"""Bytes of a request."""
MODEL = "policy"
"""What the model is called where a client asks; any name is answered."""
LEAVING = 1.0
"""Seconds that requests under way may take to end with the door."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an agent's model is, and the key that says which session is meant.

    >>> Endpoint("http://127.0.0.1:8900/v1", "secret").model
    'policy'
    """

    base_url: str
    api_key: str
    model: str = MODEL

    def client(self) -> Any:
        """An `openai.AsyncOpenAI` that asks here; those of one event loop share their connections.

        Raises:
            SettingError: the package openai is not installed.
        """
        from llm_gym.serving.clients import openai_client

        return openai_client(self)


class ChatDoor:
    """A server in a thread of its own; sessions are opened and closed from any other.

    Args:
        host: what it listens on.
        port: 0 takes a free one.
        visitors: sessions of keys that none was opened for; None: they are refused.

    >>> door = ChatDoor()
    >>> door.url.startswith("http://127.0.0.1:")
    True
    >>> door.close()
    """

    def __init__(self, host: str = HOST, port: int = 0, *, visitors: Visitors | None = None) -> None:
        self._sessions: dict[str, ChatSession] = {}
        self._visitors = visitors
        self.loop = Loop("llm_gym-chat", patience=LEAVING)
        try:
            self.port = self.loop.run(self._serve(host, port))
        except BaseException:
            self.loop.stop()
            raise
        self.url = url_of(host, self.port)

    def open(self, session: ChatSession) -> Endpoint:
        """Lets an agent in, with a key of its own."""
        key = secrets.token_urlsafe(24)
        self._sessions[key] = session
        return Endpoint(f"{self.url}/v1", key)

    def leave(self, endpoint: Endpoint) -> None:
        """Ends a session: what is asked with its key from now on is refused."""
        if session := self._sessions.pop(endpoint.api_key, None):
            session.close()

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._sessions)

    def close(self) -> None:
        """Ends the server, and every session."""
        self.loop.stop(self._runner.cleanup)
        if self._visitors is not None:
            self._visitors.close()

    async def _serve(self, host: str, port: int) -> int:
        app = web.Application(client_max_size=LARGEST)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", _health)
        # A client that hangs up ends what it asked for.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=LEAVING)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            session = self._session(request)
            asked = read_request(await _json(request))
            answer, reply = await session.answer(asked)
        except Refused as error:
            return _refusal(error)
        except Exception as error:  # of ours: the client is told in the protocol's form, and does not try again
            log.exception("chat: a request failed")
            return _refusal(Refused(f"The endpoint failed: {described(error)}", status=500))
        number = secrets.token_hex(12)
        try:
            if not asked.stream:
                return await _sent(request, web.json_response(whole(answer, asked, number)))
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)
            for chunk in chunks(answer, asked, number):
                await response.write(chunk)
            await response.write_eof()
            return response
        except BaseException:  # the client has left
            session.forget(reply)
            raise

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._session(request)
        except Refused as error:
            return _refusal(error)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "llm_gym"}
        return web.json_response({"object": "list", "data": [model]})

    def _session(self, request: web.Request) -> ChatSession:
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        key = key.strip()
        session = self._sessions.get(key)
        if session is None and self._visitors is not None and kind.lower() == "bearer" and key:
            session = self._visitors.session(key)  # a page in a browser can send no key unasked
        if session is None:
            raise Refused("No open session has this API key.", status=401, code="invalid_api_key")
        return session


async def _sent(request: web.Request, response: web.Response) -> web.Response:
    """A response that has been written to its end, or raises."""
    await response.prepare(request)
    await response.write_eof()
    return response


def _refusal(error: Refused) -> web.Response:
    # The official clients try again after an error of the server's unless this says otherwise.
    return web.json_response(error.body, status=error.status, headers={"x-should-retry": "false"})


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError, web.RequestPayloadError) as error:
        raise Refused(f"The body is no JSON: {error}") from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Refused(f"The body is larger than {LARGEST >> 20} MB.", status=413) from error


async def _health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})
