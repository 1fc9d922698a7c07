"""HTTP to MCP servers that somebody else runs: what they refuse in one sentence, what they send bounded."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

import httpx2
from mcp_types import CONNECTION_CLOSED, INVALID_PARAMS, METHOD_NOT_FOUND

from llm_gym.envs.tools.mcp.results import LONGEST, TOO_LONG

LOST = "it no longer knows the session (404 Not Found), so it was restarted or has ended it"
REFUSALS = {
    401: "it does not know who is asking (401 Unauthorized); give its entry the headers or the auth that it wants",
    403: "it does not allow this (403 Forbidden); the headers or the auth of its entry are not enough",
    404: "there is no MCP server at this address (404 Not Found); look at the path of its url",
}
"""HTTP status -> what is wrong, and what to do."""


class TooLong(httpx2.SSEError, httpx2.StreamError):
    """A message of more than `LONGEST` bytes; of both kinds, for the protocol's readers look for one of them."""


class HttpClient(httpx2.AsyncClient):
    """A client that answers a refused message with a JSON-RPC error: why, with the code of a lost connection."""

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """As `httpx2.AsyncClient.send`."""
        response = await super().send(request, **options)
        if not response.is_stream_consumed:
            stream = response.stream
            assert isinstance(stream, httpx2.AsyncByteStream)
            response.stream = _Bounded(stream, lines="event-stream" in response.headers.get("content-type", ""))
        if request.method != "POST" or response.status_code < 400:
            return response
        code, message = await _rpc_error(response)
        if code in (METHOD_NOT_FOUND, INVALID_PARAMS):
            return response  # an answer to this call, from a server that is well
        await response.aclose()
        why = _refusal(response.status_code, "mcp-session-id" in request.headers, message)
        error = {"jsonrpc": "2.0", "id": None, "error": {"code": CONNECTION_CLOSED, "message": why}}
        return httpx2.Response(response.status_code, json=error, request=request)


def client_factory(verify: Any) -> Callable[..., httpx2.AsyncClient]:
    """What fastmcp's transports make their clients with; `verify` as in httpx2, None for its default.

    Redirects are not followed here: the transports do so themselves, within the server's origin.
    """

    def make(headers: dict[str, str] | None = None, timeout: Any = None, auth: Any = None, **_: Any) -> HttpClient:
        plain = {"accept-encoding": "identity", **(headers or {})}  # a bound on compressed bytes would bound nothing
        timeout = timeout or httpx2.Timeout(30.0, read=300.0)
        return HttpClient(headers=plain, timeout=timeout, auth=auth, verify=True if verify is None else verify)

    return make


class _Bounded(httpx2.AsyncByteStream):
    """A stream of bytes that ends with an error after `LONGEST` of them, counted anew for each of its `lines`."""

    def __init__(self, stream: httpx2.AsyncByteStream, *, lines: bool) -> None:
        self._stream, self._lines = stream, lines

    async def __aiter__(self) -> AsyncIterator[bytes]:
        length = 0
        async for chunk in self._stream:
            last = chunk.rfind(b"\n") if self._lines else -1
            length = length + len(chunk) if last < 0 else len(chunk) - last - 1
            if length > LONGEST:
                raise TooLong(TOO_LONG)
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _refusal(status: int, in_session: bool, message: str) -> str:
    """One sentence without its full stop."""
    if status == 404 and in_session:
        return LOST
    phrase = HTTPStatus(status).phrase if status in {*HTTPStatus} else ""
    return REFUSALS.get(status) or f"it answers {status} {phrase}".strip() + (f": {message}" if message else "")


async def _rpc_error(response: httpx2.Response) -> tuple[int | None, str]:
    """Code and message of the JSON-RPC error that a response may hold."""
    try:
        error = json.loads(await response.aread())["error"]
        return error["code"], " ".join(str(error["message"]).split()).rstrip(".")[:200]
    except (ValueError, TypeError, KeyError, TooLong):
        return None, ""
