"""What a session does with a result that is large: nothing that others would wait for.

The protocol's library compares every result with the schema that its tool declares, in Python, in the loop that all
sessions share: ten seconds for 8 MiB of numbers. Here only results of up to `COMPARED` bytes are. It also checks every
part of a result, twice, two seconds for 100,000: here texts in a row are one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

from fastmcp.client.transports.base import ClientTransport, TransportOptions
from mcp import ClientSession
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher

from llm_gym.envs.tools.mcp.results import message_size

COMPARED = 1 << 16
"""Bytes of a result that is still compared with its tool's schema."""
PARTS = 100
"""Parts of a result that are still checked one by one."""


class _Dispatcher(JSONRPCDispatcher[Any]):
    async def send_raw_request(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """As `JSONRPCDispatcher.send_raw_request`, with texts joined where a result has more than `PARTS` parts."""
        raw = await super().send_raw_request(*arguments, **options)
        content = raw.get("content")
        return {**raw, "content": joined(content)} if isinstance(content, list) and len(content) > PARTS else raw


class _Session(ClientSession):
    def __init__(self, read_stream: Any, write_stream: Any, **options: Any) -> None:
        super().__init__(dispatcher=_Dispatcher(read_stream, write_stream), **options)

    async def validate_tool_result(self, name: str, result: Any) -> None:
        """As `ClientSession.validate_tool_result`, for results of up to `COMPARED` bytes."""
        if message_size(result) <= COMPARED:
            await super().validate_tool_result(name, result)


def joined(content: list[Any]) -> list[Any]:
    """A result's parts as they came, but with texts in a row as one, in lines; it reads the same.

    >>> joined([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}])
    [{'type': 'text', 'text': 'a\\nb'}, {'type': 'image'}]
    """
    made: list[Any] = []
    for plain, group in groupby(content, _plain):
        parts = list(group)
        lines = (part["text"] for part in parts if part["text"]) if plain else ()
        made += [{"type": "text", "text": "\n".join(lines)}] if plain else parts
    return made


def _plain(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


class Briefly(ClientTransport):
    """Another transport, with sessions that compare short results alone."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @asynccontextmanager
    async def connect_session(
        self, *, transport_options: TransportOptions | None = None, **session: Any
    ) -> AsyncGenerator[ClientSession, None]:
        """As the other's."""
        options = replace(transport_options or TransportOptions(), session_class=_Session)
        async with self._inner.connect_session(transport_options=options, **session) as made:
            yield made

    async def close(self) -> None:
        """Closes the other."""
        await self._inner.close()

    def get_session_id(self) -> str | None:
        """The other's."""
        found: str | None = self._inner.get_session_id()
        return found
