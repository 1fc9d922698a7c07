"""What a tool's result of 50 MB costs the sessions beside it: their step time during that call, against without it.

    python benchmarks/mcp_large_result.py

One run, alternating blocks: four episodes step until a fifth's call has ended, then as long without it. Milliseconds
of wall time, medians; on a busy machine only the ratio means anything. 7 MB are within the bound, and of numbers that
the tool's schema describes. Over HTTP the fifth has a server of its own: a busy server is not what is measured. In this
process making 50 MB holds the interpreter too: a row has them made before, and one makes them and returns their length.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from typing import Any

from llm_gym.envs.tools.mcp import MCPTool
from llm_gym.errors import ConfigError

OTHERS, MB = 4, 1_000_000
STDIO = """
import json, sys
def answer(message, result):
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params", {})
    if method == "initialize":
        answer(message, {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}},
                         "serverInfo": {"name": "large", "version": "1"}})
    elif method == "tools/list":
        schema = {"type": "object", "properties": {"size": {"type": "integer"}}}
        result = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
        answer(message, {"tools": [{"name": "text", "inputSchema": schema},
                                   {"name": "numbers", "inputSchema": schema, "outputSchema": result}]})
    elif params.get("name") == "text":
        answer(message, {"content": [{"type": "text", "text": "x" * params["arguments"]["size"]}]})
    elif params.get("name") == "numbers":
        numbers = [123456] * (params["arguments"]["size"] // 8)
        answer(message, {"content": [], "structuredContent": {"a": numbers}})
"""


@cache
def made(size: int) -> str:
    """A text that is made once."""
    return "x" * size


def in_memory() -> Any:
    """A server in this process."""
    from fastmcp import FastMCP

    server: Any = FastMCP("large")

    @server.tool
    def text(size: int) -> str:
        return "x" * size

    @server.tool
    def ready(size: int) -> str:
        return made(size)

    @server.tool
    def kept(size: int) -> int:
        return len("x" * size)

    @server.tool
    def numbers(size: int) -> list[int]:
        return [1234567] * (size // 8)  # eight characters each

    return server


@contextmanager
def over_http() -> Iterator[str]:
    """The same in a process of its own: its URL."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    quiet = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, __file__, str(port)], stdout=quiet, stderr=quiet) as server:
        url = f"http://127.0.0.1:{port}/mcp"
        try:
            while True:
                try:
                    MCPTool(servers=url, ahead=0).close()
                    break
                except ConfigError:
                    time.sleep(0.2)
            yield url
        finally:
            server.kill()


def begin(env: MCPTool) -> None:
    """A new episode whose session has answered once."""
    env.reset(seed=0)
    step(env, "text", 3)


def step(env: MCPTool, tool: str, size: int) -> str:
    """What a call gives."""
    *_, info = env.step(env.chat.encode_reply(env.call_text(tool, size=size)))
    return str(info["messages"][-1]["content"])


def block(one: MCPTool, others: list[MCPTool], call: tuple[str, int], seconds: float) -> tuple[list[float], float, str]:
    """Seconds of each step of the others during a call (or for some seconds), of the call, and its answer."""
    for env in (one, *others):
        begin(env)
    over, taken = threading.Event(), []

    def play(env: MCPTool) -> None:
        while not over.is_set():
            before = time.perf_counter()
            step(env, "text", 3)
            taken.append(time.perf_counter() - before)

    threads = [threading.Thread(target=play, args=(env,)) for env in others]
    for thread in threads:
        thread.start()
    started = time.perf_counter()
    said = step(one, *call) if not seconds else ""
    time.sleep(seconds)
    lasted = time.perf_counter() - started
    over.set()
    for thread in threads:
        thread.join()
    return taken, lasted, said


def measure(name: str, server: Any, beside_it: Any, call: tuple[str, int], blocks: int) -> str:
    """A row of the table: the server that is called, that of the others, the call, and how often."""
    options: dict[str, Any] = {
        "max_calls": 10**6, "max_context": 10**7, "max_output": 60, "call_timeout": 300.0, "start_timeout": 60.0
    }  # fmt: skip
    with ExitStack() as stack:
        which = [server, *[beside_it] * OTHERS]
        one, *others = (stack.enter_context(closing(MCPTool(servers=it, **options))) for it in which)
        beside, alone, calls, said = [], [], [], ""
        for _ in range(blocks):
            during, lasted, said = block(one, others, call, 0.0)
            beside += during
            calls.append(lasted)
            alone += block(one, others, call, lasted)[0]
    with_it, without = statistics.median(beside), statistics.median(alone)
    numbers = [1e3 * x for x in (statistics.median(calls), without, with_it)]
    shown = " | ".join(f"{x:,.1f}" for x in (*numbers, 1e3 * max(alone), 1e3 * max(beside)))
    return f"| {name} | {shown} | {with_it / without:.2f} | {said.splitlines()[0][:60]} |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        in_memory().run("http", port=int(sys.argv[1]))
    print("| server, result | call | step without | during | longest without | during | ratio | the call's answer |")
    print("|---|---|---|---|---|---|---|---|")
    stdio = {"it": {"command": sys.executable, "args": ["-c", STDIO]}}
    memory = {"it": in_memory}
    print(measure("stdio, text", stdio, stdio, ("text", 50 * MB), 5), flush=True)
    print(measure("stdio, 7 MB of numbers", stdio, stdio, ("numbers", 7 * MB), 5), flush=True)
    made(50 * MB)
    print(measure("in this process, text that it had", memory, memory, ("ready", 50 * MB), 20), flush=True)
    print(measure("in this process, text", memory, memory, ("text", 50 * MB), 20), flush=True)
    print(measure("in this process, made, not returned", memory, memory, ("kept", 50 * MB), 20), flush=True)
    print(measure("in this process, numbers", memory, memory, ("numbers", 50 * MB), 5), flush=True)
    with over_http() as url, over_http() as another:
        print(measure("http, text", url, another, ("text", 50 * MB), 5), flush=True)
