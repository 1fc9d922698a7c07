"""Episodes that wait: CPU of the driver for a completion, threads, and what a slow reward costs a rollout.

    OMP_NUM_THREADS=1 python benchmarks/waiting.py [--many 5000] [--few 100] [--threads 1000] [--blocks 5]

Two turns an episode, both of which wait: in an `async def reply` that sleeps, or in a plain one in a thread. The
policy is scripted. A sleep is longer than it takes to begin all episodes, so that all of them wait at once; "waiting"
is how many did. CPU is that of the whole process. Blocks alternate; the table gives medians, and ratios of medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import llm_gym
from llm_gym import Reply, TextEnv
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.rollouts.driver import Driver, rollout

CHAT = llm_gym.load_chat()
TURNS = 2


class Sleeps(TextEnv):
    """Waits in each of its turns, awaited."""

    seconds: ClassVar[float] = 0.5
    waiting: ClassVar[int] = 0
    most: ClassVar[int] = 0
    threads: ClassVar[int] = 0

    def open(self) -> Any:
        self.turn = 0
        return [{"role": "user", "content": "Go on."}]

    async def reply(self, text: str) -> Reply:
        self.enter()
        await asyncio.sleep(Sleeps.seconds)
        return self.leave()

    def enter(self) -> None:
        Sleeps.waiting += 1
        Sleeps.most = max(Sleeps.most, Sleeps.waiting)
        Sleeps.threads = max(Sleeps.threads, threading.active_count())

    def leave(self) -> Reply:
        Sleeps.waiting -= 1
        self.turn += 1
        return Reply(messages=[{"role": "user", "content": "Go on."}], reward=1.0, done=self.turn == TURNS)


class Blocks(Sleeps):
    """Waits in each of its turns, in a thread."""

    metadata: ClassVar[dict[str, Any]] = {**TextEnv.metadata, "blocking": True}

    def reply(self, text: str) -> Reply:  # type: ignore[override]
        self.enter()
        time.sleep(Sleeps.seconds)
        return self.leave()


def block(driver: Driver, concurrent: int, rounds: int) -> tuple[float, int, int]:
    """CPU-seconds of a completion, most episodes that waited at once, and most threads."""
    Sleeps.seconds, Sleeps.most, Sleeps.threads = max(0.2, concurrent / 1000), 0, 0
    began = time.process_time()
    episodes = driver.run(range(concurrent * rounds))
    spent = time.process_time() - began
    assert {e.reward for e in episodes} == {float(TURNS)}
    return spent / (len(episodes) * TURNS), Sleeps.most, Sleeps.threads


def completions(few: int, many: int, threads: int, blocks: int) -> None:
    """The table of episodes that wait."""
    policy = ScriptedPolicy([CHAT.encode_reply("7+8=15. Answer: 85")])
    cases = [("awaited", Sleeps, few), ("awaited", Sleeps, many), ("thread", Blocks, few), ("thread", Blocks, threads)]
    cases = [case for case in cases if case[2]]
    drivers = {case: Driver(case[1], policy, max_concurrent=case[2]) for case in cases}
    found: dict[Any, list[tuple[float, int, int]]] = {case: [] for case in cases}
    for case, driver in drivers.items():
        driver.run(range(case[2]))  # makes the environments
        if case[1] is Blocks:
            driver.close()  # and their threads, which would count
    for _ in range(blocks):
        for case, driver in drivers.items():
            found[case].append(block(driver, case[2], max(1, round(1000 / case[2]))))
            if case[1] is Blocks:
                driver.close()
    base = statistics.median(cpu for cpu, *_ in found[cases[0]])
    print(f"{'way':10}{'episodes':>10}{'waiting':>10}{'threads':>10}{'CPU us a completion':>22}{'ratio':>8}")
    for case in cases:
        cpu = statistics.median(each[0] for each in found[case])
        most, used = (max(each[i] for each in found[case]) for i in (1, 2))
        print(f"{case[0]:10}{case[2]:10,}{most:10,}{used:10,}{cpu * 1e6:22.0f}{cpu / base:8.2f}")
    for driver in drivers.values():
        driver.close()


async def judge(text: str, row: Any) -> float:
    await asyncio.sleep(2.0)
    return 1.0


def slow(text: str, row: Any) -> float:
    time.sleep(0.2)
    return 1.0


def rewards(blocks: int) -> None:
    """The table of slow rewards."""
    policy = ScriptedPolicy([CHAT.encode_reply("5")])
    print(f"{'64 episodes with a reward of':34}{'seconds':>10}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "qa.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(64)), encoding="utf-8")
        cases: dict[str, Callable[..., Any]] = {"2 s, async def": judge, ".2 s, a plain function": slow}
        for name, reward in cases.items():
            args = {"dataset": str(file), "reward": reward}
            walls = []
            for _ in range(blocks):
                began = time.perf_counter()
                rollout("Dataset-v0", policy, seeds=range(64), env_args=args, max_concurrent=64)
                walls.append(time.perf_counter() - began)
            print(f"{name:34}{statistics.median(walls):10.2f}   {min(walls):.2f} to {max(walls):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=5000)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1000, help="episodes in threads; 0: none")
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    completions(options.few, options.many, options.threads, options.blocks)
    rewards(options.blocks)


if __name__ == "__main__":
    main()
