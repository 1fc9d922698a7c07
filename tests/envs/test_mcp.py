"""`MCPTool-v0` with servers inside this process; tests/heavy has real ones."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import gymnasium
import jsonschema
import pytest
from fastmcp import Client, FastMCP
from fastmcp.exceptions import ToolError
from fastmcp.utilities.types import Image
from gymnasium.utils.env_checker import check_env
from pydantic import BaseModel

from llm_gym.core import StopReason
from llm_gym.envs.tools.mcp.calculator_server import build
from llm_gym.envs.tools.mcp.env import MCPTool, read_servers
from llm_gym.envs.tools.mcp.results import public_names, resolved, result_text
from llm_gym.errors import ConfigError, DataError
from llm_gym.testing import check_environment


def say(env: MCPTool, text: str) -> tuple[float, dict[str, Any]]:
    _, reward, _, _, info = env.step(env.chat.encode_reply(text))
    return reward, info


def call(env: MCPTool, name: str, **arguments: Any) -> str:
    return str(say(env, env.call_text(name, **arguments))[1]["messages"][-1]["content"])


def started_since(before: set[threading.Thread]) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("llm_gym") and t not in before]


def test_the_default_task() -> None:
    before = set(threading.enumerate())
    with closing(gymnasium.make("llm_gym/MCPTool-v0").unwrapped) as env:
        assert isinstance(env, MCPTool)
        _, info = env.reset(seed=4)
        (schema,) = info["tools"]
        assert schema["function"]["name"] == "calculator"
        assert schema["function"]["parameters"]["properties"] == {"expression": {"type": "string"}}
        expression = info["messages"][0]["content"].removeprefix("What is ").removesuffix("?")
        answer = call(env, "calculator", expression=expression.replace(" ", ""))
        assert int(answer) == eval(expression)
        reward, info = say(env, f"Answer: {answer}")
        assert reward == 1.0
        assert info["rewards"] == {"correct": 1.0, "format": 0.0, "tool_calls": 1.0}
    assert not started_since(before), "close ends the loop's thread"


def test_it_conforms() -> None:
    check_environment("MCPTool-v0")
    with closing(gymnasium.make("llm_gym/MCPTool-v0")) as env:
        check_env(env.unwrapped)


def test_unseen_problems_are_another_split() -> None:
    with closing(MCPTool(split="train")) as train, closing(MCPTool(split="test")) as test:
        asked = [{env.reset(seed=i)[1]["messages"][0]["content"] for i in range(60)} for env in (train, test)]
    assert not asked[0] & asked[1]


def test_episodes_have_sessions_of_their_own() -> None:
    with closing(MCPTool(servers=build)) as one, closing(MCPTool(servers=build)) as two:
        for env in (one, two):
            env.reset(seed=0)
        call(one, "write_note", title="a", text="b")
        assert json.loads(call(one, "read_notes")) == {"a": "b"}
        assert json.loads(call(two, "read_notes")) == {}
        one.reset(seed=1)
        assert json.loads(call(one, "read_notes")) == {}


def test_a_shared_session_is_asked_for() -> None:
    with (
        closing(MCPTool(servers=build, session="shared")) as one,
        closing(MCPTool(servers=build, session="shared")) as two,
    ):
        one.reset(seed=0)
        two.reset(seed=0)
        call(one, "write_note", title="a", text="b")
        assert json.loads(call(two, "read_notes")) == {"a": "b"}


def test_many_threads_and_one_pool() -> None:
    envs = [MCPTool(servers=build) for _ in range(12)]
    failed: list[Any] = []

    def play(index: int, env: MCPTool) -> None:
        for seed in range(3):
            env.reset(seed=seed)
            call(env, "write_note", title=str(index), text=str(seed))
            if json.loads(call(env, "read_notes")) != {str(index): str(seed)}:
                failed.append((index, seed))

    threads = [threading.Thread(target=play, args=item) for item in enumerate(envs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for env in envs:
        env.close()
    assert not failed


class Pose(BaseModel):
    """A nested argument."""

    x: float
    tags: list[str] = []
    inner: Pose | None = None


def odd_server() -> FastMCP:
    server: Any = FastMCP("odd")

    @server.tool
    def pose(pose: Pose, title: str = "none") -> Pose:
        """Takes a pose."""
        return pose

    @server.tool
    def picture() -> Image:
        return Image(data=b"\x89PNG" * 10, format="png")

    @server.tool
    async def slow() -> str:
        await asyncio.sleep(1000)
        return "late"

    @server.tool
    def bad() -> str:
        raise ValueError("a secret path")

    @server.tool
    def mute() -> str:
        raise ToolError("")

    return server


def test_schemas_with_references() -> None:
    with closing(MCPTool(servers=odd_server)) as env:
        _, info = env.reset(seed=0)
        parameters = {t["function"]["name"]: t["function"]["parameters"] for t in info["tools"]}["pose"]
        assert "$" not in json.dumps(parameters)
        inner = parameters["properties"]["pose"]
        assert inner["properties"]["x"] == {"type": "number"}
        assert "title" in parameters["properties"], "a property of that name is no keyword"
        assert json.loads(call(env, "pose", pose={"x": "1.5"}))["x"] == 1.5
        assert "the argument 'pose'.x is missing" in call(env, "pose", pose={})
        assert "must be an array" in call(env, "pose", pose={"x": 1, "tags": 3})


def test_results_that_are_no_text_and_calls_that_fail() -> None:
    with closing(MCPTool(servers=odd_server, call_timeout=3)) as env:
        env.reset(seed=0)
        assert call(env, "picture") == "[image: image/png, 40 bytes]"
        assert call(env, "slow") == "Error: slow gave no result within 3 seconds."
        assert call(env, "bad").startswith("Error: Error calling tool 'bad'")
        assert call(env, "mute") == "Error: mute failed and did not say why."
        assert call(env, "picture") == "[image: image/png, 40 bytes]", "the session is still good"


@pytest.mark.parametrize(
    ("block", "text"),
    [
        ({"type": "text", "text": "a"}, "a"),
        ({"type": "image", "mime_type": "image/png", "data": "QUJD"}, "[image: image/png, 3 bytes]"),
        ({"type": "audio", "mime_type": "audio/wav", "data": "QUI="}, "[audio: audio/wav, 2 bytes]"),
        ({"type": "resource_link", "uri": "a://b", "name": "b", "description": None}, "[resource a://b, b]"),
        ({"type": "resource", "resource": {"uri": "a://b", "text": "hi"}}, "[resource a://b]\nhi"),
        ({"type": "resource", "resource": {"uri": "a://b", "blob": "QUJD", "mime_type": "x/y"}}, "[resource a://b: x/y, 3 bytes]"),
        ({"type": "hologram"}, "[hologram]"),
    ],
)  # fmt: skip
def test_content_as_text(block: dict[str, Any], text: str) -> None:
    made = SimpleNamespace(**{k: SimpleNamespace(**v) if isinstance(v, dict) else v for k, v in block.items()})
    assert result_text(SimpleNamespace(content=[made], structured_content=None)) == text
    assert result_text(SimpleNamespace(content=[made, made], structured_content={"a": 1})) == f"{text}\n{text}"


def test_structured_content_stands_in_for_missing_text() -> None:
    assert result_text(SimpleNamespace(content=[], structured_content={"a": "é"})) == '{"a": "é"}'
    assert result_text(SimpleNamespace(content=None, structured_content=None)) == ""


def test_resolved_schemas_mean_the_same() -> None:
    schema = {
        "$schema": "x",
        "type": "object",
        "title": "T",
        "properties": {"title": {"$ref": "#/$defs/A~1b"}, "tree": {"$ref": "#/$defs/Tree"}},
        "$defs": {
            "A/b": {"title": "A", "enum": [1, 2]},
            "Tree": {"type": "object", "properties": {"left": {"$ref": "#/$defs/Tree"}}},
        },
    }
    plain = resolved(schema, schema)
    assert plain == {
        "type": "object",
        "properties": {"title": {"enum": [1, 2]}, "tree": {"type": "object", "properties": {"left": {}}}},
    }
    for value in ({"title": 1}, {"title": 3}, {"tree": 1}, {"tree": {"left": {}}}):
        verdicts = [jsonschema.Draft202012Validator(s).is_valid(value) for s in ({**schema, "$schema": ""}, plain)]
        assert verdicts[0] == verdicts[1]
    assert resolved({"$ref": "http://else.where/x"}, {}) == {}


def test_names_that_clash_get_their_servers() -> None:
    tools = {s: [SimpleNamespace(name=n) for n in names] for s, names in {"a": ["go", "see"], "b": ["go"]}.items()}
    assert list(public_names(tools)) == ["a_go", "see", "b_go"]
    with closing(MCPTool(servers={"a": build, "b": odd_server}, allow=["calculator", "picture"])) as env:
        _, info = env.reset(seed=0)
        assert [t["function"]["name"] for t in info["tools"]] == ["calculator", "picture"]
        assert call(env, "calculator", expression="1+1") == "2"
        assert call(env, "picture").startswith("[image")


def test_a_data_set_of_ones_own(tmp_path: Any) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"q": "Six times seven?", "a": "42"}\n{"q": "One?", "a": "1"}\n')
    with closing(MCPTool(dataset=str(path), question="q", answer="a")) as env:
        _, info = env.reset(seed=0, options={"task": 0})
        assert info["messages"][0]["content"] == "Six times seven?"
        assert say(env, "Answer: 42")[0] == 1.0
    with pytest.raises(DataError, match="answer: unknown value 'answer'"):
        MCPTool(dataset=str(path), question="q")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"servers": "no/such/file.json"}, "servers: cannot read 'no/such/file.json'"),
        ({"servers": {}}, "want a form like"),
        ({"servers": {"mcpServers": {"a": {"cmd": "x"}}}}, "want a form like"),
        ({"session": "epsiode"}, "session: unknown value 'epsiode'; did you mean 'episode'"),
        ({"allow": ["calulator"]}, "allow: unknown value 'calulator'; did you mean 'calculator'"),
        ({"deny": ["x"]}, "deny: unknown value 'x'"),
        ({"deny": ["calculator"]}, "tools: got none"),
        ({"operations": "/"}, "operations: unknown value '/'"),
        ({"digits_min": 9, "digits_max": 3}, "digits_min, digits_max: got 9 and 3"),
    ],
)
def test_bad_settings(kwargs: dict[str, Any], words: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match=words):
        MCPTool(**kwargs)
    assert not started_since(before), "nothing is left behind"


def test_a_server_that_is_gone_ends_the_episode_as_data() -> None:
    with closing(MCPTool(servers=build, call_timeout=5)) as env:
        env.reset(seed=0)
        assert call(env, "calculator", expression="1+1") == "2"
        session, pool = env.held, env.pool
        assert session is not None
        assert pool is not None
        pool.loop.submit(session.close()).result(10)
        env.held = session
        _, info = say(env, env.call_text("calculator", expression="1+1"))
        assert info["stop_reason"] is StopReason.TOOL_FAILURE
        env.reset(seed=1)
        assert call(env, "calculator", expression="1+1") == "2", "the next episode has a new one"


def test_accepted_forms_of_servers() -> None:
    assert read_servers("http://a/b") == {"server": {"url": "http://a/b"}}
    assert read_servers({"mcpServers": {"a": {"command": "x"}}}) == {"a": {"command": "x"}}
    server = build()
    assert read_servers(server) == {"server": server}


def test_our_own_server_speaks_mcp() -> None:
    async def names() -> set[str]:
        async with Client(build()) as client:
            return {tool.name for tool in await client.list_tools()}

    assert asyncio.run(names()) == {"calculator", "write_note", "read_notes"}


IMPORTS = """
import sys
from llm_gym.envs.tools.mcp.session import Pool
assert "fastmcp" not in sys.modules
pool = Pool.enter({"it": {"command": "true"}}, start_timeout=30.0, ahead=1, shared=False)
assert {"fastmcp.client.transports", "fastmcp.mcp_config"} <= sys.modules.keys()
pool.leave()
"""


def test_what_has_to_be_imported_is_no_part_of_a_servers_start() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
