"""MCP servers of this process: what is too long is never written as JSON, and all else is as the library has it."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import mcp_types
import pydantic_core
import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.dependencies import Depends
from fastmcp.exceptions import ToolError
from fastmcp.server.middleware import Middleware
from fastmcp.tools.base import ToolResult
from fastmcp.tools.function_tool import FunctionTool
from fastmcp.utilities.types import Image
from pydantic import BaseModel, Field, PlainSerializer, model_serializer

from llm_gym.core import StopReason
from llm_gym.envs.tools.mcp.env import MCPTool
from llm_gym.envs.tools.mcp.in_process import transport_to
from llm_gym.envs.tools.mcp.length import DEEPEST, longer
from llm_gym.envs.tools.mcp.results import LONGEST
from llm_gym.envs.tools.mcp.transport import PARTS, Briefly

TOO_LONG = "Error: MCP server 'server' failed: it sent a message of more than 8 MiB."


class Witness(BaseModel):
    """Notes when it is written as JSON."""

    written: ClassVar[list[Any]] = []

    @model_serializer
    def write(self) -> str:
        self.written.append(self)
        return "witness"


class Model(BaseModel):
    text: str


@dataclass
class Plain:
    text: str
    witness: Witness


class Base(BaseModel):
    name: str = "base"


class Derived(Base):
    text: str = "x" * LONGEST


class Hiding(BaseModel):
    name: str = "hiding"
    text: str = Field(default="x" * LONGEST, exclude=True)


def witnessed(result: Callable[[], Any]) -> FastMCP:
    """A server whose tool gives this."""
    made: Any = FastMCP("witnessed")
    made.tool(result, name="act")
    return made


def ask(server: Any, name: str = "act", **arguments: Any) -> tuple[str, StopReason | None]:
    """What an episode is told, and how it ends if it does."""
    with closing(MCPTool(servers=server, max_output=1000)) as env:
        env.reset(seed=0)
        *_, info = env.step(env.chat.encode_reply(env.call_text(name, **arguments)))
        return info["messages"][-1]["content"], info.get("stop_reason")


LONG = "x" * (LONGEST + 1)
RETURNED: dict[str, Callable[[], Any]] = {
    "texts": lambda: [LONG, Witness()],
    "bytes": lambda: {"bytes": LONG.encode(), "witness": Witness()},
    "numbers": lambda: [Witness(), *[1234567] * (LONGEST // 6)],
    "floats": lambda: [Witness(), *[0.123456] * (LONGEST // 6)],
    "rows": lambda: [{"a": Witness()}, *[{"name": "x" * 100, "at": (1, 2)}] * (LONGEST // 100)],
    "keys": lambda: {LONG: Witness()},
    "a model": lambda: (Witness(), Model(text=LONG)),
    "a data class": lambda: {"it": Plain(LONG, Witness())},
    "a generator": lambda: (part for part in (LONG, Witness())),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_result_that_is_too_long_is_never_written_as_json(name: str) -> None:
    """It holds the interpreter: half a second of every session's time for 50 MB, which are refused afterwards."""
    Witness.written.clear()
    assert ask(witnessed(RETURNED[name])) == (TOO_LONG, StopReason.TOOL_FAILURE)
    assert not Witness.written
    ask(witnessed(lambda: ["short", Witness()]))
    assert Witness.written, "what is short is written"


def test_a_result_of_a_mounted_server_is_not_either() -> None:
    Witness.written.clear()
    outer = FastMCP("outer")
    outer.mount(witnessed(RETURNED["texts"]), namespace="inner")
    assert ask(outer, "inner_act") == (TOO_LONG, StopReason.TOOL_FAILURE)
    assert not Witness.written


def declared(returns: Any, result: Any) -> FastMCP:
    def act() -> Any:
        return result

    act.__annotations__["return"] = returns
    return witnessed(act)


@pytest.mark.parametrize(
    ("returns", "result", "said"),
    [
        (Base, Derived(), '{"name":"base"}'),
        (list[Base], [Derived()], '[{"name":"base"}]'),
        (Any, Hiding(), '{"name":"hiding"}'),
        (Annotated[str, PlainSerializer(lambda text: text[:3])], LONG, "xxx"),
    ],
)
def test_what_is_written_in_part_is_not_too_long(returns: Any, result: Any, said: str) -> None:
    assert ask(declared(returns, result)) == (said, None)


def some(deep: int = 0) -> Any:
    """A random value."""
    kinds: list[Callable[[], Any]] = [
        lambda: random.choice([0, 8, -1, True, None, 10 ** random.randrange(30)]),
        lambda: random.random() * 10.0 ** random.randrange(-20, 30),
        lambda: "é" * random.randrange(4),
        lambda: [some(deep + 1) for _ in range(random.randrange(4))],
        lambda: {str(i): some(deep + 1) for i in range(random.randrange(4))},
        lambda: (some(deep + 1), Base()),
    ]
    return random.choice(kinds[: 6 if deep < 4 else 3])()


def test_nothing_that_fits_is_too_long() -> None:
    async def check() -> None:
        random.seed(0)
        for _ in range(5000):
            value = some()
            length = len(pydantic_core.to_json(value))
            assert not await longer(value, length), value
            assert not length > 20 or await longer(value, length // 8), "and what is far too long is found"
        assert await longer([[1, 2]] * 1000, 5000)

    asyncio.run(check())


def test_what_holds_itself_is_an_error_of_the_tool() -> None:
    ring: list[Any] = []
    ring.append(ring)
    assert not asyncio.run(longer(ring, 10 * DEEPEST))
    told, end = ask(declared(list, ring))
    assert "ircular" in told
    assert end is None


class Shorten(Middleware):
    """Middleware that sees a result whole."""

    async def on_call_tool(self, context: Any, call_next: Any) -> ToolResult:
        result = await call_next(context)
        text = f"{len(result.content[0].text)} characters"
        return ToolResult(content=text, structured_content={"result": text}, meta=result.meta)


def test_what_others_may_shorten_is_theirs() -> None:
    """A tool that calls another, and middleware, here and in a mounted server."""
    server: Any = FastMCP("server")

    @server.tool
    def act() -> str:
        return LONG

    @server.tool
    async def outer(context: Context) -> str:
        return str(len((await context.fastmcp.call_tool("act")).content[0].text))

    assert ask(server, "outer") == (str(len(LONG)), None)
    server.add_middleware(Shorten())
    assert ask(server) == (f"{len(LONG)} characters", None)
    around = FastMCP("around")
    around.mount(server)
    assert ask(around) == (f"{len(LONG)} characters", None)


class Counting(Middleware):
    """Middleware that is not asked about calls."""

    async def on_list_tools(self, context: Any, call_next: Any) -> Any:
        return [tool.model_copy(update={"description": "counted"}) for tool in await call_next(context)]


async def _depended() -> str:
    return "depended"


def everything() -> FastMCP:
    """A server with one of each."""
    server: Any = FastMCP("everything", instructions="All.", middleware=[Counting()], mask_error_details=True)
    inner: Any = FastMCP("inner")

    @server.tool
    async def with_context(context: Context, text: str) -> str:
        await context.info(text)
        await context.report_progress(1, 2)
        await context.set_state("text", text)
        return f"{context.fastmcp.name} {await context.get_state('text')}"

    @server.tool
    def in_a_thread() -> bool:
        return threading.current_thread() is not threading.main_thread()

    @server.tool(run_in_thread=False)
    def in_the_loop() -> bool:
        return asyncio.get_running_loop() is not None

    @server.tool
    def depending(text: str, other: str = Depends(_depended)) -> str:
        return text + other

    @server.tool
    def structured(number: int) -> Base:
        return Base(name=str(number))

    @server.tool(output_schema=None)
    def unstructured() -> dict[str, int]:
        return {"a": 1}

    @server.tool
    async def several() -> Any:
        for part in (1, "a"):
            yield part

    @server.tool
    def picture() -> Image:
        return Image(data=b"png", format="png")

    @server.tool
    def whole() -> ToolResult:
        return ToolResult(content="text", structured_content={"a": 1}, meta={"b": 2})

    @server.tool
    def failing(how: str) -> str:
        raise ToolError("said", log_level=logging.DEBUG) if how == "said" else ValueError("masked")

    @server.resource("data://one")
    def one() -> str:
        return "one"

    @server.prompt
    def question(about: str) -> str:
        return f"What is {about}?"

    @inner.tool
    def within(context: Context) -> str:
        return context.fastmcp.name

    server.mount(inner, namespace="inner")
    return server


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("with_context", {"text": "a"}),
    ("with_context", {}),
    ("in_a_thread", {}),
    ("in_the_loop", {}),
    ("depending", {"text": "a"}),
    ("structured", {"number": "7"}),
    ("structured", {"number": "x"}),
    ("unstructured", {}),
    ("several", {}),
    ("picture", {}),
    ("whole", {}),
    ("failing", {"how": "said"}),
    ("failing", {"how": "masked"}),
    ("inner_within", {}),
    ("unknown", {}),
]


async def seen(client: Any) -> list[Any]:
    """All that a client can see of `everything`."""
    async with client:
        return [
            client.initialize_result.instructions,
            client.initialize_result.capabilities,
            await client.list_tools(),
            await client.list_resources(),
            await client.read_resource("data://one"),
            await client.list_prompts(),
            await client.get_prompt("question", {"about": "it"}),
            [await client.call_tool_mcp(name, arguments) for name, arguments in CALLS],
        ]


def test_all_else_is_as_it_was() -> None:
    """Context, threads, dependencies, schemas, errors, resources, prompts, mounted servers, middleware."""
    logs: list[list[Any]] = [[], []]

    async def log(into: int, message: Any) -> None:
        logs[into].append(message.data)

    async def both() -> list[list[Any]]:
        server = everything()
        direct = Client(server, mode="legacy", log_handler=lambda message: log(0, message))
        return [
            await seen(direct),
            await seen(Client(transport_to(server), mode="legacy", log_handler=lambda message: log(1, message))),
        ]

    before, after = asyncio.run(both())
    assert after == before
    assert logs[0] == logs[1] != []


def test_the_server_itself_is_left_alone() -> None:
    server = everything()
    lifetimes: list[Any] = []

    async def check() -> None:
        before, middleware = dict(vars(server)), list(server.middleware)
        async with Client(transport_to(server)) as client:
            assert (await client.call_tool_mcp("structured", {"number": 1})).structured_content == {"name": "1"}
            server.tool(lambda: "late", name="late")
            assert (await client.call_tool_mcp("late", {})).content[0].text == "late", "what is added later is there"
            assert type(await server.get_tool("structured")) is FunctionTool
            lifetimes.append(type(server))
        assert vars(server).keys() == before.keys()
        assert [type(one) for one in server.middleware] == [type(one) for one in middleware]
        assert lifetimes == [FastMCP]

    asyncio.run(check())


def test_who_asks_the_server_itself_gets_all_of_it() -> None:
    async def check() -> None:
        server = declared(str, LONG)
        async with Client(transport_to(server)) as ours, Client(server) as theirs:
            assert (await ours.call_tool_mcp("act", {})).is_error
            assert (await theirs.call_tool_mcp("act", {})).content[0].text == LONG

    asyncio.run(check())


def test_texts_of_many_parts_are_joined_before_each_is_checked() -> None:
    """Twice, and in the loop of all sessions: two seconds for 100,000."""
    texts = [mcp_types.TextContent(type="text", text=str(i)) for i in range(PARTS)]
    picture = mcp_types.ImageContent(type="image", data="", mime_type="image/png")

    async def check() -> None:
        server = declared(Any, [*texts, picture, *texts])
        async with Client(Briefly(transport_to(server))) as client:
            content = (await client.call_tool_mcp("act", {})).content
            text = "\n".join(map(str, range(PARTS)))
            assert [getattr(part, "text", part.type) for part in content] == [text, "image", text]

    asyncio.run(check())
    assert ask(declared(Any, [*texts, picture])) == (
        ask(declared(Any, texts))[0] + "\n[image: image/png, 0 bytes]",
        None,
    )
