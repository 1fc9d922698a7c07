"""MCP servers that restart, refuse, and send what nobody expects: what each costs, and what is said of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
from fastmcp import FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.utilities.types import Image
from mcp_http import Hosted, hosted
from test_mcp import odd_server

from llm_gym.core import StopReason
from llm_gym.envs.tools.mcp.env import MCPTool
from llm_gym.envs.tools.mcp.results import LONGEST, MOST_PARTS, resolved
from llm_gym.errors import ConfigError


@pytest.fixture
def server() -> Iterator[Hosted]:
    with hosted() as made:
        yield made


class Episode:
    """An environment with this server, in an episode; `say` calls its tool."""

    def __init__(self, server: Any, **kwargs: Any) -> None:
        self.env = MCPTool(servers=server.url if isinstance(server, Hosted) else server, **kwargs)
        self.again()

    def again(self) -> None:
        _, self.info = self.env.reset(seed=0)

    def say(self, text: str) -> str:
        *_, self.info = self.env.step(self.env.chat.encode_reply(self.env.call_text("act", text=text)))
        return str(self.info["messages"][-1]["content"])

    @property
    def end(self) -> StopReason | None:
        return self.info.get("stop_reason")

    def close(self) -> None:
        self.env.close()


LOST = (
    "Error: MCP server 'server' failed: it no longer knows the session (404 Not Found), so it was restarted or has "
    "ended it."
)


def test_a_server_that_restarts_costs_the_episode_that_it_served_and_no_other(server: Hosted) -> None:
    """Neither the next one nor those whose sessions were started ahead."""
    with closing(Episode(server, ahead=2)) as one, closing(Episode(server, ahead=2)) as two:
        assert one.say("a") == "a"
        server.restart()
        assert one.say("b") == LOST
        assert one.end is StopReason.TOOL_FAILURE
        assert two.say("c") == "c", "its session was ready before the restart"
        one.again()
        assert one.say("d") == "d"
        two.again()
        server.restart()
        assert two.say("e") == "e", "a restart between two episodes costs none"


def test_sessions_that_could_not_start_meanwhile_cost_no_episode(server: Hosted) -> None:
    """Those started ahead while the server was away; it is there again when they are taken."""
    with closing(Episode(server, ahead=2)) as episode:
        for _ in range(3):
            assert server.let_in.acquire(timeout=60)
        server.full = True
        for _ in range(3):
            assert episode.say("a") == "a", "its session was ready"
            episode.again()
        for _ in range(2):
            assert server.turned_away.acquire(timeout=60)
        server.full = False
        for _ in range(3):
            assert episode.say("b") == "b"
            episode.again()


def test_a_shared_session_that_is_lost_is_lost_once(server: Hosted) -> None:
    with ExitStack() as stack:
        episodes = [stack.enter_context(closing(Episode(server, session="shared"))) for _ in range(3)]
        assert [episode.say("a") for episode in episodes] == ["a"] * 3
        server.restart()
        assert [episode.say("b") for episode in episodes] == [LOST, "b", "b"]
        assert [episode.end for episode in episodes] == [StopReason.TOOL_FAILURE, None, None]


REFUSED = [
    (401, "it does not know who is asking (401 Unauthorized); give its entry the headers or the auth that it wants."),
    (403, "it does not allow this (403 Forbidden); the headers or the auth of its entry are not enough."),
    (500, "it answers 500 Internal Server Error."),
    (400, "it answers 400 Bad Request."),
]


@pytest.mark.parametrize(("status", "words"), REFUSED)
def test_what_a_server_refuses_is_said_in_one_sentence(server: Hosted, status: int, words: str) -> None:
    with closing(Episode(server)) as episode:
        assert episode.say("a") == "a"
        server.status = status
        assert episode.say("b") == f"Error: MCP server 'server' failed: {words}"
        assert episode.end is StopReason.TOOL_FAILURE
    with pytest.raises(ConfigError) as refused:
        MCPTool(servers=server.url)
    assert str(refused.value) == f"servers: MCP server 'server' did not start: {words}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "text", "text": "a"}, {"type": "hologram", "data": "b"}], "unknown type 'hologram'"),
        ([{"type": "text"}], "content.0.TextContent.text: Field required"),
        (["a"], "content.0.TextContent: Input should be a valid dictionary or instance of TextContent"),
    ],
)
def test_a_result_that_is_not_valid_is_answered_in_words(server: Hosted, content: list[Any], words: str) -> None:
    with closing(Episode(server)) as episode:
        server.content = lambda text: content if text == "odd" else [{"type": "text", "text": text}]
        assert episode.say("odd") == f"Error: act gave a result that is not valid MCP ({words})."
        assert episode.say("a") == "a", "the session is still good"


def test_a_message_that_is_too_long_costs_its_own_session_alone(server: Hosted) -> None:
    server.content = lambda text: [{"type": "text", "text": "x" * int(text)}]
    with closing(Episode(server, max_output=100)) as one, closing(Episode(server)) as two:
        assert two.say("3") == "xxx"
        assert "(4999900 characters left out)" in one.say("5000000")
        assert one.say(str(LONGEST)).endswith("it sent a message of more than 8 MiB.")
        assert one.end is StopReason.TOOL_FAILURE
        assert two.say("4") == "xxxx"


def large_server() -> FastMCP:
    made: Any = FastMCP("large")

    @made.tool
    def act(text: str) -> str:
        return "x" * int(text)

    @made.tool
    def numbers(many: int) -> list[int]:
        return [1234567] * many

    @made.tool
    def bytes_of(many: int) -> Image:
        return Image(data=bytes(many), format="png")

    @made.tool
    def fail(many: int) -> str:
        raise ToolError("x" * many, log_level=logging.DEBUG)

    return made


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("act", {"text": str(LONGEST + 1)}),
        ("numbers", {"many": LONGEST // 12}),
        ("bytes_of", {"many": LONGEST}),
        ("fail", {"many": LONGEST + 1}),
    ],
)
def test_what_a_server_of_this_process_sends_has_the_same_bound(name: str, arguments: dict[str, Any]) -> None:
    with closing(Episode(large_server)) as one, closing(Episode(large_server)) as two:
        assert two.say("3") == "xxx"
        *_, info = one.env.step(one.env.chat.encode_reply(one.env.call_text(name, **arguments)))
        words = "Error: MCP server 'server' failed: it sent a message of more than 8 MiB."
        assert info["messages"][-1]["content"] == words
        assert info["stop_reason"] is StopReason.TOOL_FAILURE
        assert two.say("4") == "xxxx"
        one.again()
        assert one.say("5") == "xxxxx"


def test_short_results_alone_are_compared_with_what_the_tool_declares(server: Hosted) -> None:
    """It is done in Python in the loop of all sessions, ten seconds for 8 MiB."""
    server.tools = [{**server.tools[0], "outputSchema": {"type": "object"}}]
    server.content = lambda text: [{"type": "text", "text": "x" * int(text)}]
    with closing(Episode(server, max_output=1 << 20)) as episode:
        assert "not valid MCP (Tool act has an output schema but did not return" in episode.say("9")
        assert episode.say(str(1 << 17)) == "x" * (1 << 17)


def test_a_schema_without_a_type_is_named(server: Hosted) -> None:
    server.tools = [{"name": "act", "inputSchema": {"properties": {}}}]
    words = r"what it sent is not valid MCP \(tools.0.inputSchema.type: Field required\)\.$"
    with pytest.raises(ConfigError, match=words):
        MCPTool(servers=server.url)


def test_definitions_that_use_each_other_twice_stay_small() -> None:
    """Put in place as they are written, these are 2^60 parts; and a chain of a thousand is deeper than Python goes."""
    ref = lambda name: {"$ref": f"#/$defs/{name}"}  # noqa: E731
    doubled = {f"d{i}": {"properties": {"a": ref(f"d{i + 1}"), "b": ref(f"d{i + 1}")}} for i in range(60)}
    chain = {f"c{i}": {"items": ref(f"c{i + 1}")} for i in range(1000)}
    schema = {"properties": {"x": ref("d0"), "y": ref("c0")}, "$defs": {**doubled, **chain}}
    assert len(json.dumps(resolved(schema, schema))) < 100 * MOST_PARTS


def test_tracebacks_of_the_libraries_are_not_in_the_log(server: Hosted, capfd: pytest.CaptureFixture[str]) -> None:
    """A tool that raises in this process, and a server whose answer the protocol's reader cannot read."""
    with closing(MCPTool(servers=odd_server)) as env:
        env.reset(seed=0)
        env.step(env.chat.encode_reply(env.call_text("bad")))
    server.content = lambda text: [{"type": "text", "text": "x" * LONGEST}]
    with closing(Episode(server)) as episode:
        episode.say("a")
    assert capfd.readouterr().err == ""
