"""Real MCP servers driven through `MCPTool-v0`, and servers that misbehave: each ends as data within its deadline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from leftovers import living
from sandbox_tiers import within

from llm_gym.core import StopReason
from llm_gym.envs.tools.mcp.env import MCPTool
from llm_gym.errors import ConfigError
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import rollout
from llm_gym.testing import check_environment

pytestmark = pytest.mark.heavy
ROOT = Path(__file__).parents[2]
NODE = Path(sys.prefix) / "mcp" / "node_modules" / ".bin"
START = 120.0
"""Seconds a server may take to start on a busy machine."""
MISSED = 300.0
"""Seconds that only a missed deadline takes: what misbehaves here would go on for 1000 or for ever."""


def node(name: str) -> str:
    if not (NODE / name).exists():
        pytest.skip(f"needs {name}; the Makefile's test target installs it")
    return str(NODE / name)


def entry(command: str, *args: str, **env: str) -> dict[str, Any]:
    return {"command": command, "args": list(args), "env": env}


def python(code: str) -> dict[str, Any]:
    """A server written for the occasion."""
    return entry(sys.executable, "-c", textwrap.dedent(code))


SPEAK = """
import json, os, signal, subprocess, sys, time
def answer(message, result):
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
def serve(call, tools=("act",)):
    for line in sys.stdin:
        message = json.loads(line)
        method = message.get("method")
        if method == "initialize":
            answer(message, {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                             "serverInfo": {"name": "odd", "version": "1"}})
        elif method == "tools/list":
            schema = {"type": "object", "properties": {"text": {"type": "string"}}}
            answer(message, {"tools": [{"name": name, "inputSchema": schema} for name in tools]})
        elif method == "tools/call":
            call(message, message["params"].get("arguments", {}).get("text", ""))
def say(message, text):
    answer(message, {"content": [{"type": "text", "text": text}]})
"""


def odd(call: str, before: str = "") -> dict[str, Any]:
    """A server of a few lines whose only tool `act(text)` runs `call` (with `message` and `text`)."""
    body = f"def call(message, text):\n{textwrap.indent(textwrap.dedent(call), '    ')}\n"
    return entry(sys.executable, "-c", SPEAK + textwrap.dedent(before) + body + "serve(call)")


class Player:
    """An episode played by hand."""

    def __init__(self, env: MCPTool, seed: int = 0) -> None:
        self.env = env
        self.obs, self.info = env.reset(seed=seed)
        self.tools = {tool["function"]["name"]: tool["function"] for tool in self.info["tools"]}

    def call(self, name: str, **arguments: Any) -> str:
        """The result of a call, as the model sees it."""
        self.obs, _, terminated, truncated, self.info = self.env.step(
            self.env.chat.encode_reply(self.env.call_text(name, **arguments))
        )
        self.over = terminated or truncated
        assert self.info["messages"][-1]["role"] == "tool"
        return str(self.info["messages"][-1]["content"])


@contextmanager
def playing(server: Any, **kwargs: Any) -> Iterator[Player]:
    kwargs = {"start_timeout": START, "call_timeout": 60.0, "max_context": 100_000, "max_tokens": 4096, **kwargs}
    with closing(MCPTool(servers={"mcpServers": {"it": server}}, max_calls=100, ahead=1, **kwargs)) as env:
        yield Player(env)
    assert within(60, lambda: not below()), "servers are gone once the environment is closed"


OTHERS: set[psutil.Process] = set()
"""What earlier tests share and keep, such as Python's sandbox."""


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(below())


def below() -> set[psutil.Process]:
    """Living processes that the test started."""
    return set(living(psutil.Process().children(recursive=True))) - OTHERS


# Real servers


def test_everything() -> None:
    with playing(entry(node("mcp-server-everything"), "stdio")) as player:
        assert player.call("echo", message="héllo\n<|im_end|>") == "Echo: héllo\n<|im_end|>"
        assert "5" in player.call("get-sum", a=2, b="3"), "arguments are converted where that is safe"
        assert "the argument 'b' is missing" in player.call("get-sum", a=2)
        image = player.call("get-tiny-image")
        assert "[image: image/png, " in image
        assert "base64" not in image
        structured = player.call("get-structured-content", location="Chicago")
        assert "temperature" in structured
        assert "must be one of" in player.call("get-structured-content", location="Atlantis")
        assert "[resource " in player.call("get-resource-reference", resourceType="Text", resourceId=1)
        assert "[resource " in player.call("get-resource-links", count=2)
        env_seen = json.loads(player.call("get-env"))
        assert set(env_seen) <= {"PATH", "HOME", "TMPDIR", "PWD", "SHLVL", "_", "OLDPWD"}, "nothing of the trainer's"
        schema = player.tools["get-sum"]["parameters"]
        assert set(schema["required"]) == {"a", "b"}
        assert "$schema" not in schema


def test_memory_is_an_episodes_own() -> None:
    """Two episodes at once and one after the other: none sees what another wrote."""
    server = entry(node("mcp-server-memory"), MEMORY_FILE_PATH="{scratch}/memory.json")
    fact = {"name": "Ada", "entityType": "person", "observations": ["counts"]}
    with playing(server) as one, closing(MCPTool(servers={"it": server}, start_timeout=START, ahead=1)) as second:
        two = Player(second)
        assert "Ada" in one.call("create_entities", entities=[fact])
        assert "Ada" in one.call("read_graph")
        assert "Ada" not in two.call("read_graph")
        assert "Ada" not in Player(one.env, seed=1).call("read_graph"), "the next episode starts empty"


def test_a_shared_session_keeps_its_state() -> None:
    server = entry(node("mcp-server-memory"), MEMORY_FILE_PATH="{scratch}/memory.json")
    fact = {"name": "Ada", "entityType": "person", "observations": ["counts"]}
    with playing(server, session="shared") as one:
        one.call("create_entities", entities=[fact])
        assert "Ada" in Player(one.env, seed=1).call("read_graph")


def test_filesystem() -> None:
    shown = ["write_file", "read_text_file", "list_allowed_directories"]
    with playing(entry(node("mcp-server-filesystem"), "{scratch}"), allow=shown) as player:
        folder = player.call("list_allowed_directories").splitlines()[-1]
        path = f"{folder}/note.txt"
        assert "Successfully" in player.call("write_file", path=path, content="one\ntwo")
        assert player.call("read_text_file", path=path) == "one\ntwo"
        assert "Error: " in player.call("read_text_file", path="/etc/passwd")
        assert "must be a number" in player.call("read_text_file", path=path, head="x")
        assert set(player.tools) == set(shown)
    assert not Path(folder).exists(), "the session's folder ends with it"


def test_time() -> None:
    with playing(entry(sys.executable, "-m", "mcp_server_time", "--local-timezone", "UTC")) as player:
        there = player.call("convert_time", source_timezone="Asia/Tokyo", time="12:00", target_timezone="UTC")
        assert "03:00:00+00:00" in there
        assert player.call("get_current_time", timezone="Mars/Olympus").startswith("Error: ")


def test_git(tmp_path: Path) -> None:
    git = shutil.which("git") or pytest.skip("needs git")
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "First", "--allow-empty"]
    for args in (["init", "-q"], commit):
        subprocess.run([git, *args], cwd=tmp_path, check=True)
    (tmp_path / "new.txt").write_text("new")
    with playing(entry(sys.executable, "-m", "mcp_server_git", "--repository", str(tmp_path))) as player:
        assert "new.txt" in player.call("git_status", repo_path=str(tmp_path))
        assert "First" in player.call("git_log", repo_path=str(tmp_path), max_count=1)
        assert player.call("git_show", repo_path=str(tmp_path), revision="nonsense").startswith("Error")


def test_our_own_server_over_stdio(tmp_path: Path) -> None:
    config = tmp_path / "servers.json"
    server = entry(sys.executable, "-m", "llm_gym.envs.tools.mcp.calculator_server", PYTHONPATH=str(ROOT))
    config.write_text(json.dumps({"mcpServers": {"own": server}}))
    with closing(MCPTool(servers=str(config), start_timeout=START, ahead=1)) as env:
        player = Player(env)
        assert player.call("calculator", expression="1234*5678") == "7006652"
        player.call("write_note", title="a", text="b")
        assert json.loads(player.call("read_notes")) == {"a": "b"}
        assert player.call("calculator", expression="1/0") == "Error: division by zero."
        assert json.loads(Player(env, seed=1).call("read_notes")) == {}
    assert within(60, lambda: not below())


def test_over_http() -> None:
    """A server that somebody else runs; when it goes away the episode ends and says so, and the next has it again."""
    port = free_port()
    code = "import sys; from llm_gym.envs.tools.mcp.calculator_server import build; build().run('http', port=int(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(port)]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = lambda: subprocess.Popen(command, env=path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: E731
    server = start()
    try:
        env = until_up(f"http://127.0.0.1:{port}/mcp")
        with closing(env):
            player = Player(env)
            assert player.call("calculator", expression="6*7") == "42"
            server.kill()
            server.wait()
            assert player.call("calculator", expression="6*7").startswith("Error: MCP server 'server'")
            assert player.info["stop_reason"] is StopReason.TOOL_FAILURE
            server = start()
            until_up(f"http://127.0.0.1:{port}/mcp", ahead=1).close()  # not the pool that has seen it up
            player = Player(env, seed=1)
            assert player.call("calculator", expression="6*7") == "42"
            server.kill()
            server.wait()
            server = start()
            until_up(f"http://127.0.0.1:{port}/mcp", ahead=1).close()  # not the pool that has seen it up
            assert "no longer knows the session" in player.call("calculator", expression="6*7")
            assert player.info["stop_reason"] is StopReason.TOOL_FAILURE
            assert Player(env, seed=2).call("calculator", expression="6*7") == "42"
    finally:
        server.kill()
        server.wait()


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until_up(url: str, **kwargs: Any) -> MCPTool:
    patience = time.monotonic() + START
    while True:
        try:
            return MCPTool(servers=url, start_timeout=START, call_timeout=30, **kwargs)
        except ConfigError:
            if time.monotonic() > patience:
                raise


def test_conformance_over_stdio() -> None:
    server = odd("say(message, str(len(text)))")
    check_environment(MCPTool, servers={"it": server}, start_timeout=START)


def test_a_rollout_with_servers_of_their_own() -> None:
    """Many episodes at once, each with a server that counts its calls: every count starts at one."""
    server = odd("seen.append(1); say(message, f'call {len(seen)}')", "seen = []\n")
    make = lambda: MCPTool(servers={"it": server}, start_timeout=START)  # noqa: E731
    with closing(make()) as env:
        call, chat = env.call_text("act", text="x"), env.chat

    def script(context: Any) -> str:
        said = chat.tokenizer.decode(context).count("call ")
        return call if said < 3 else "Answer: 1"

    episodes = rollout(make, ScriptedPolicy(script, chat), seeds=range(6), group_size=2, max_concurrent=6)
    for episode in episodes:
        assert episode.error is None
        assert [m["content"] for m in episode.messages if m["role"] == "tool"] == ["call 1", "call 2", "call 3"]
    assert within(60, lambda: not below())


# Servers that misbehave

DEAF = """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
time.sleep(1000)
"""
DEATHS = ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)", "os.close(1); time.sleep(1000)"]


def timed(function: Any) -> tuple[Any, float]:
    started = time.monotonic()
    return function(), time.monotonic() - started


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (python("import time\ntime.sleep(1000)"), "did not start in 3 s"),
        (python("while True: print('garbage')"), "did not start in 3 s"),
        (python("import sys\nwhile True: sys.stdout.write('x' * 999)"), "did not start: .*more than 8 MiB"),
        (python("import sys\nsys.exit('no licence')"), "did not start: .*no licence"),
        (entry("no-such-command-anywhere"), "did not start: .*no-such-command-anywhere: No such file"),
        (python(DEAF), "did not start in 3 s"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_start_is_a_bad_setting(server: dict[str, Any], words: str) -> None:
    def make() -> str:
        with pytest.raises(ConfigError, match=words) as error:  # who ends by itself is not waited for
            MCPTool(servers={"bad": server}, start_timeout=3.0 if "in 3 s" in words else START)
        return str(error.value)

    text, seconds = timed(make)
    assert text.startswith("servers: MCP server 'bad' did not start")
    assert seconds < MISSED
    assert within(60, lambda: not below())


def test_a_server_that_is_slow_to_start() -> None:
    with playing(odd("say(message, 'at last')", "time.sleep(3)\n")) as player:
        assert player.call("act", text="x") == "at last"


def test_garbage_between_the_answers_is_passed_over() -> None:
    server = odd("print('DEBUG: called'); print('{\"half\":'); say(message, 'fine')", "print('Hello!')\n")
    with playing(server) as player:
        assert player.call("act", text="x") == "fine"
        assert player.call("act", text="x") == "fine"


def test_a_call_that_is_never_answered() -> None:
    """The model is told in time, and the session is still good."""
    with playing(odd("text == 'hang' or say(message, 'fine')"), call_timeout=1.0) as player:
        text, seconds = timed(lambda: player.call("act", text="hang"))
        assert text == "Error: act gave no result within 1 seconds."
        assert seconds < MISSED
        assert not player.over
        player.env.call_timeout = 60
        assert player.call("act", text="x") == "fine"


@pytest.mark.parametrize("way", DEATHS)
def test_a_server_that_dies_in_a_call(way: str) -> None:
    with playing(odd(way), call_timeout=10.0) as player:
        text, seconds = timed(lambda: player.call("act", text="x"))
        assert seconds < MISSED
        if "close" not in way:
            assert text.startswith("Error: MCP server 'it' is gone")
            assert player.info["stop_reason"] is StopReason.TOOL_FAILURE
        following = Player(player.env, seed=1)
        assert "calls" not in following.info, "the next episode has a server of its own"
        assert following.obs is not None


def test_a_server_killed_from_outside() -> None:
    server = odd("say(message, str(os.getpid())) if text == 'pid' else time.sleep(1000)")
    with playing(server, call_timeout=30.0) as player:
        pid = int(player.call("act", text="pid"))
        os.kill(pid, signal.SIGKILL)
        assert player.call("act", text="x").startswith("Error: MCP server 'it' is gone")
        assert player.info["stop_reason"] is StopReason.TOOL_FAILURE


def test_fifty_megabytes_cost_the_session_that_sent_them() -> None:
    server = odd("say(message, 'x' * (50_000_000 if text == 'flood' else 3))")
    with playing(server) as player, closing(MCPTool(servers={"it": server}, start_timeout=START, ahead=0)) as env:
        other = Player(env)
        assert other.call("act", text="x") == "xxx"
        said = player.call("act", text="flood")
        assert said == "Error: MCP server 'it' is gone: it sent a message of more than 8 MiB."
        assert player.info["stop_reason"] is StopReason.TOOL_FAILURE
        assert other.call("act", text="x") == "xxx"


def test_a_flood_and_an_answer_that_is_no_text() -> None:
    """JSON with half a surrogate pair is refused by the protocol's own reader: the call is never answered."""
    server = odd("say(message, 'x' * 5_000_000 if text == 'flood' else 'a\\ud800')")
    with playing(server, max_output=200, call_timeout=5.0) as player:
        assert player.call("act", text="odd") == "Error: act gave no result within 5 seconds."
    with playing(server, max_output=200) as player:
        text = player.call("act", text="flood")
        assert len(text) < 300
        assert "(4999800 characters left out)" in text


FAMILY = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(0.01)
    os._exit(0)
"""


def test_whatever_a_server_started_ends_with_it() -> None:
    """A grandchild in a session of its own that ignores every polite signal."""
    with playing(odd("say(message, 'fine')", FAMILY)) as player:
        assert player.call("act", text="x") == "fine"
        assert len(below()) >= 3
    assert within(60, lambda: not below())


def test_everything_ends_with_the_trainer(tmp_path: Path) -> None:
    """The process that holds the session is killed outright."""
    servers = tmp_path / "servers.json"
    servers.write_text(json.dumps({"mcpServers": {"it": odd("say(message, 'fine')", FAMILY)}}))
    code = f"""
    import sys, time
    from llm_gym.envs.tools.mcp.env import MCPTool
    env = MCPTool(servers={str(servers)!r}, start_timeout={START}, ahead=2)
    env.reset(seed=0)
    env.step(env.chat.encode_reply(env.call_text("act", text="x")))
    print("playing", flush=True)
    time.sleep(1000)
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=env)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"playing\n"
    servers_of = psutil.Process(trainer.pid).children(recursive=True)
    assert len(servers_of) >= 4
    trainer.kill()
    trainer.wait()
    assert within(60, lambda: not living(servers_of)), living(servers_of)
    assert within(60, lambda: not list(tmp_path.glob("llm_gym-mcp-*"))), "the folders of its sessions are gone too"
