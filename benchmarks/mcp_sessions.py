"""What a session with an MCP server costs: to start, to call, and a new server for every call.

    python benchmarks/mcp_sessions.py        # after `make test`, which installs the servers

Milliseconds of wall time, medians; on a busy machine only their ratios mean anything.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_gym.envs.tools.mcp.calculator_server import build
from llm_gym.envs.tools.mcp.session import Pool, Session

NODE = Path(sys.prefix) / "mcp" / "node_modules" / ".bin"
OURS = {"command": sys.executable, "args": ["-m", "llm_gym.envs.tools.mcp.calculator_server"]}
SERVERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ours, in memory": (build, "calculator", {"expression": "6*7"}),
    "ours, stdio": (
        {**OURS, "env": {"PYTHONPATH": str(Path(__file__).parents[1])}}, "calculator", {"expression": "6*7"},
    ),
    "everything (Node), stdio": (
        {"command": str(NODE / "mcp-server-everything"), "args": ["stdio"]}, "echo", {"message": "hi"},
    ),
    "time (Python), stdio": (
        {"command": sys.executable, "args": ["-m", "mcp_server_time"]}, "get_current_time", {"timezone": "UTC"},
    ),
}  # fmt: skip
STARTS, CALLS = 5, 100


def median(function: Callable[[], Any], count: int) -> float:
    """Median of the milliseconds that `count` calls of `function` take."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def measure(server: Any, tool: str, arguments: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Milliseconds: a session started on demand, one taken from the pool, a call in it, a new server per call."""
    cold = Pool({"it": server}, start_timeout=120, ahead=0, shared=False)

    def start() -> None:
        cold.give_back(cold.take())

    def anew() -> None:
        session = cold.take()
        cold.call(session, tool, dict(arguments), 60)
        cold.give_back(session)

    start()
    on_demand, per_call = median(start, STARTS), median(anew, STARTS)
    cold.users = 1
    cold.leave()
    warm = Pool({"it": server}, start_timeout=120, ahead=STARTS + 1, shared=False)
    session = warm.take()
    for ready in list(warm._ready):
        ready.started.result(120)  # type: ignore[union-attr]
    more: list[Session] = []
    taken = median(lambda: more.append(warm.take()), 1)
    call = median(lambda: warm.call(session, tool, dict(arguments), 60), CALLS)
    for used in (session, *more):
        warm.give_back(used)
    warm.users = 1
    warm.leave()
    return on_demand, taken, call, per_call


if __name__ == "__main__":
    print("| server | start on demand | from the pool | call | new server per call | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (server, tool, arguments) in SERVERS.items():
        on_demand, taken, call, per_call = measure(server, tool, arguments)
        print(f"| {name} | {on_demand:.0f} | {taken:.2f} | {call:.1f} | {per_call:.0f} | {per_call / call:.0f} |")
