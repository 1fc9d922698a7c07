"""Servers of this process, whose results are measured before they become messages.

The library writes what a tool's function returned as JSON and reads it again, twice, and holds the interpreter
meanwhile: half a second of every session's time for 50 MB, which are too long in any case. What stands here in a
server's place has its class and its attributes, but hands out copies of its tools that measure first. The server itself
is left as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from fastmcp import FastMCP
from fastmcp.client.transports import infer_transport
from fastmcp.server.middleware import Middleware
from fastmcp.server.providers.fastmcp_provider import FastMCPProviderTool
from fastmcp.tools.base import Tool, ToolResult
from fastmcp.tools.function_tool import FunctionTool
from fastmcp.utilities.types import get_cached_typeadapter
from pydantic import PydanticSchemaGenerationError, PydanticUserError

from llm_gym.envs.tools.mcp.length import longer, whole
from llm_gym.envs.tools.mcp.results import LONGEST, NOT_SENT, TOO_LONG

HOOKS = ("__call__", "on_message", "on_request", "on_call_tool")
"""Where middleware meets a tool's result."""
_for_us: ContextVar[bool] = ContextVar("for_us", default=False)
"""Whether the result of the tool that is called next goes to a session of ours, and to nobody before."""


def transport_to(server: Any) -> Any:
    """The library's way to reach a server of this process; of a `FastMCP`, to what stands for it."""
    return infer_transport(measured(server) if isinstance(server, FastMCP) else server)


def measured(server: FastMCP[Any]) -> Any:
    """What stands in a server's place for one session: the same, but a result that is too long never becomes a message.

    Measured is what functions return, also those of mounted servers. Left alone are results that somebody else may
    shorten: of tools that other tools call, and where middleware, an extension or a class of the user's own handles
    calls; and tools that make their results themselves (a `ToolResult`, tools made of others, OpenAPI, proxies).
    """
    low = copy.copy(server._mcp_server)
    low._request_handlers = dict(low._request_handlers)
    handler = low.get_request_handler("tools/call")
    if handler is None or getattr(handler.handler, "__self__", None) is not server:
        return server
    call = handler.handler.__func__  # type: ignore[attr-defined]
    stand_in = _stand_in(server, _mcp_server=low, _lifespan_manager=server._lifespan_manager)

    async def call_tool(context: Any, params: Any) -> Any:
        with _set(True):
            return await call(stand_in, context, params)

    low.add_request_handler("tools/call", handler.params_type, call_tool)
    return stand_in


class _Measuring(FunctionTool):
    """A copy of a tool for one call."""

    async def run(self, arguments: dict[str, Any]) -> ToolResult:
        with _set(False):  # what the function calls itself answers the function
            got: Any = await super().run(arguments)
        if isinstance(got, _Returned):
            if await longer(got.value, LONGEST) and _whole(self.return_type):
                return ToolResult(content=TOO_LONG, meta={NOT_SENT: True}, is_error=True)
            got = super().convert_result(got.value)
        result: ToolResult = got
        return result

    def convert_result(self, raw_value: Any) -> Any:
        return _Returned(raw_value)


class _Returned(NamedTuple):
    """What a function returned, before it is converted."""

    value: Any


def _stand_in(server: FastMCP[Any], **others: Any) -> Any:
    """An object of a server's class that has its attributes, those to come included, except `others`."""
    kind = type(server)

    async def get_tool(self: Any, name: str, version: Any = None) -> Tool | None:
        tool = await kind.get_tool(self, name, version)
        return _measuring(tool) if tool is not None and _for_us.get() and not _handled(self, kind) else tool

    replaced = {name: property(partial(_first, value)) for name, value in others.items()}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    made: Any = object.__new__(type(kind.__name__, (kind,), {**names, **replaced, "get_tool": get_tool}))
    made.__dict__ = server.__dict__
    return made


def _first(value: Any, _: Any) -> Any:
    return value


def _measuring(tool: Tool) -> Tool:
    """A copy of a tool that measures, where what it gives is made of what its function returned."""
    if type(tool) is FunctionTool:
        made = tool.model_copy()
        made.__class__ = _Measuring
        return made
    if type(tool) is FastMCPProviderTool:  # of a mounted server
        mounted = tool.model_copy()
        mounted._server = _stand_in(tool._server)
        return mounted
    return tool


def _handled(server: Any, kind: type[FastMCP[Any]]) -> bool:
    """Whether somebody's code may look at a result on its way."""
    hooks = [getattr(type(one), hook, None) is getattr(Middleware, hook) for one in server.middleware for hook in HOOKS]
    return not all(hooks) or bool(server._extensions) or kind.call_tool is not FastMCP.call_tool


def _whole(return_type: Any) -> bool:
    """Whether the library writes all of a value for a tool that declares this type."""
    try:
        return whole(get_cached_typeadapter(return_type).core_schema)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError, TypeError):
        return True  # it then writes what there is


@contextmanager
def _set(value: bool) -> Iterator[None]:
    token = _for_us.set(value)
    try:
        yield
    finally:
        _for_us.reset(token)
