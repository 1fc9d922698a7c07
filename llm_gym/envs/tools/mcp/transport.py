"""What a session does with a result that is large: nothing that others would wait for.

The protocol's library compares every result with the schema that its tool declares, in Python, in the loop that all
sessions share: ten seconds for 8 MiB of numbers. Here only results of up to `COMPARED` bytes are.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastmcp.client.transports.base import ClientTransport, TransportOptions
from mcp import ClientSession

from llm_gym.envs.tools.mcp.results import message_size

COMPARED = 1 << 16
"""Bytes of a result that is still compared with its tool's schema."""


class _Session(ClientSession):
    async def validate_tool_result(self, name: str, result: Any) -> None:
        """As `ClientSession.validate_tool_result`, for results of up to `COMPARED` bytes."""
        if message_size(result) <= COMPARED:
            await super().validate_tool_result(name, result)


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
