"""Python for episodes, side by side: our sandboxed worker and kernel, a plain Jupyter kernel, a subprocess a call.

    python benchmarks/python_tool.py [--episodes 64] [--calls 20] [--tier auto]

Every figure is of one run on one machine: compare columns, not runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from jupyter_client.manager import KernelManager

from llm_gym.envs.tools import sandbox
from llm_gym.envs.tools.sandbox import PythonSession, pool

CELL = "y = sum(i * i for i in range(100))\nprint(y)"
ANSWER = "328350\n"


def start_up(tier: str) -> dict[str, float]:
    """Median seconds until the first cell is answered."""

    def plain() -> None:
        manager = KernelManager()
        manager.start_kernel(stderr=subprocess.DEVNULL)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        client.execute_interactive("1", timeout=120, output_hook=lambda _: None)
        took.append(time.perf_counter() - began)
        client.stop_channels()
        manager.shutdown_kernel(now=True)

    def ours(backend: str, pooled: bool) -> None:
        if not pooled:
            for handles in pool._ready.values():
                while handles:
                    handles.pop().end()
        nonlocal began
        began = time.perf_counter()
        session = PythonSession(backend, tier)
        ready.append(time.perf_counter() - began)
        session.run("1")
        took.append(time.perf_counter() - began)
        for handles in pool._ready.values():
            for handle in handles:
                handle.wait_ready()
        session.close()

    rows: dict[str, Callable[[], None]] = {
        "plain jupyter_client": plain,
        "kernel, from the zygote": lambda: ours("jupyter", False),
        "kernel, from the pool": lambda: ours("jupyter", True),
        "worker, from the zygote": lambda: ours("worker", False),
        "worker, from the pool": lambda: ours("worker", True),
    }
    for backend in ("jupyter", "worker"):
        PythonSession(backend, tier).close()
    result: dict[str, float] = {}
    for name, once in rows.items():
        took: list[float] = []
        ready: list[float] = []
        for _ in range(7):
            began = time.perf_counter()
            once()
        result[name] = statistics.median(ready or took)
        first = statistics.median(took)
        print(f"  {name:26s} ready {1e3 * result[name]:8.1f} ms   first answer {1e3 * first:8.1f} ms", flush=True)
    return result


def calls_per_second(episodes: int, calls: int, tier: str) -> dict[str, float]:
    """Cells a second, with all episodes at once."""

    def sessions(backend: str) -> float:
        with ThreadPoolExecutor(episodes) as threads:
            opened = list(threads.map(lambda _: PythonSession(backend, tier), range(episodes)))
            time.sleep(1)  # let the pool fill up again, which is not what is measured
            print(f"  {backend}: {memory(opened):.1f} MB (proportional set size) for each of {episodes}", flush=True)
            began = time.perf_counter()
            list(threads.map(lambda s: [check(s.run(CELL, timeout=60).output) for _ in range(calls)], opened))
            seconds = time.perf_counter() - began
            for session in opened:
                session.close()
        return episodes * calls / seconds

    def processes() -> float:
        def episode(_: int) -> None:
            for _ in range(few):
                command = [sys.executable, "-c", CELL]
                check(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

        few = max(1, calls // 10)
        began = time.perf_counter()
        with ThreadPoolExecutor(episodes) as threads:
            list(threads.map(episode, range(episodes)))
        return episodes * few / (time.perf_counter() - began)

    return {"subprocess a call": processes(), "kernel": sessions("jupyter"), "worker": sessions("worker")}


def check(output: str) -> None:
    """The cell was really run."""
    assert output == ANSWER, output


def memory(sessions: list[PythonSession]) -> float:
    """Megabytes of the zygote and all sessions, divided by the sessions."""
    family = [p for box in pool.SANDBOXES.values() for p in psutil.Process(box.process.pid).children(recursive=True)]
    waiting = sum(len(handles) for handles in pool._ready.values())
    total = sum(proportional(p.pid) for p in family)
    return total / (len(sessions) + waiting) / 1e6


def proportional(pid: int) -> int:
    """Bytes, shared pages counted in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--tier", default="auto")
    options = parser.parse_args()
    print(sandbox.tier(options.tier))
    started = start_up(options.tier)
    plain = started["plain jupyter_client"]
    for name in list(started)[1:]:
        print(f"  {name}: 1/{plain / started[name]:.0f} of a plain start")
    sandbox.shutdown()
    rates = calls_per_second(options.episodes, options.calls, options.tier)
    for name, rate in rates.items():
        print(f"  {name:20s} {rate:8.0f} calls/s   {rate / rates['subprocess a call']:6.1f}x")


if __name__ == "__main__":
    main()
