"""Environments over the wire against the same in this process: episodes a second, and whether they are the same.

    OMP_NUM_THREADS=1 python benchmarks/env_service.py [--sessions 1000] [--episodes 2000] [--blocks 5]

The server is `llmgym serve-env` in a process of its own, on this machine; all sessions are on one connection. The
policy costs nothing to speak of, so that nearly all is environment, driver and wire: with a model the ratio is nearer
to 1. Blocks alternate; the table gives medians, and ratios of medians. CPU is of this process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

import llm_gym
from llm_gym.core import Completion, Episode, Ids, Sampling
from llm_gym.rollouts.driver import Driver

GUESSES = ["I think it is 50.", "Perhaps 25?", "75", "12", "no idea", "37", "62", "87", "99", "1"]
CASES: dict[str, list[str]] = {
    "GuessNumber-v0": GUESSES,
    "Arithmetic-v0": ["7+8=15, 4+3+1=8. Answer: 85"],
}
"""Environment -> what the policy may say."""


class Seeded:
    """Says what the request's seed picks, at once."""

    version = 0

    def __init__(self, replies: list[str]) -> None:
        chat = llm_gym.load_chat()
        tokens = [chat.encode_reply(reply) for reply in replies]
        self.completions = [Completion(ids, np.zeros(len(ids), np.float32), "stop") for ids in tokens]

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        await asyncio.sleep(0)
        return self.completions[(seed or 0) % len(self.completions)]


@contextmanager
def served(env: str) -> Iterator[str]:
    """The URL of a server."""
    command = [sys.executable, "-m", "llm_gym.cli", "serve-env", env, "--port", "0", "--max-sessions", "8192"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://[^;\s]+", server.stdout.readline())
        assert found is not None
        yield found[0]
    finally:
        server.terminate()
        server.wait()


def block(driver: Driver, episodes: int) -> tuple[float, float, list[Episode]]:
    """Episodes a second, and a CPU-second of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    played = driver.run(range(episodes))
    return episodes / (time.perf_counter() - wall), episodes / (time.process_time() - cpu), played


def same(one: Episode, two: Episode) -> bool:
    """Whether two episodes are alike, token for token."""
    plain = [(e.messages, e.rewards, e.stop_reason, e.reward, e.error) for e in (one, two)]
    turns = [(t.prompt, t.completion.tokens) for e in (one, two) for t in e.turns]
    half = len(turns) // 2
    pairs = zip(turns[:half], turns[half:], strict=True)
    return plain[0] == plain[1] and all(np.array_equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


def measure(env: str, replies: list[str], sessions: int, episodes: int, blocks: int) -> list[Any]:
    """A row of the table."""
    policy: Any = Seeded(replies)
    with ExitStack() as stack:
        url = stack.enter_context(served(env))
        drivers = [
            stack.enter_context(Driver(name, policy, env_args=args, max_concurrent=sessions))
            for name, args in ((env, {}), ("OpenEnv-v0", {"url": url}))
        ]
        for driver in drivers:
            driver.run(range(sessions))  # makes the environments
        found: list[list[tuple[float, float, list[Episode]]]] = [[], []]
        for _ in range(blocks):
            for results, driver in zip(found, drivers, strict=True):
                results.append(block(driver, episodes))
    equal = all(same(a, b) for a, b in zip(found[0][-1][2], found[1][-1][2], strict=True))
    here, there = (statistics.median(result[0] for result in results) for results in found)
    cpu_here, cpu_there = (statistics.median(result[1] for result in results) for results in found)
    turns = statistics.mean(len(episode.turns) for episode in found[0][-1][2])
    return [
        env,
        f"{turns:.1f}",
        f"{here:,.0f}",
        f"{there:,.0f}",
        f"{there / here:.2f}",
        f"{cpu_there / cpu_here:.2f}",
        equal,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    print("environment, turns, episodes/s here, over the wire, ratio, ratio of CPU, same episodes")
    for env, replies in CASES.items():
        print(*measure(env, replies, options.sessions, options.episodes, options.blocks), sep=", ", flush=True)


if __name__ == "__main__":
    main()
