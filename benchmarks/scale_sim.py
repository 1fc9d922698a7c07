"""Where driver, wire and learner saturate beyond what runs here: measured costs, recorded latencies, an event queue.

    OMP_NUM_THREADS=1 python benchmarks/scale_sim.py --measure
    python benchmarks/scale_sim.py RUN [--seconds 300] [--turns 8] [--learner .8] [--cost MS]

`--measure`: CPU of a completion for the driver (scripted policy), for HTTP and JSON by length of context, and bytes of
an episode; medians of blocks. Else a simulation on the product's `Scheduler`: groups are drawn from those that the run
folder has recorded (seconds of each episode, members of a group together), scaled to a mean; each turn first takes its
share of the episode's seconds, then `cost` of its driver process, first come first served. A step takes the next
numbers when all are whole, and learns for `learner` times what rollouts need to make as many; weights come in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import pickle
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import llm_gym
from llm_gym import Reply, TextEnv
from llm_gym.core import Sampling
from llm_gym.episode_files import encode
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.policies.http import Remote
from llm_gym.policies.scripted import ScriptedPolicy
from llm_gym.policies.vllm_server.labels import Weights, read
from llm_gym.policies.vllm_server.policy import request
from llm_gym.rollouts.driver import Driver
from llm_gym.rollouts.scheduler import Scheduler

GROUP, LONG = 8, Sampling(max_tokens=1024)
REPLY = 128
"""Tokens of a completion over HTTP."""


class Talks(TextEnv):
    """So many turns, none of which waits."""

    turns = 8

    def open(self) -> Any:
        self.turn = 0
        return [{"role": "user", "content": "Go on."}]

    def reply(self, text: str) -> Reply:
        self.turn += 1
        return Reply(messages=[{"role": "user", "content": "Go on."}], reward=1.0, done=self.turn == self.turns)


# What is measured


def median_of(blocks: int, block: Callable[[], float]) -> str:
    """The median of blocks after one that warms up, and their range."""
    _, *found = (block() for _ in range(1 + blocks))
    return f"{statistics.median(found):9.3f}   {min(found):.3f} to {max(found):.3f}"


def measure(blocks: int) -> None:
    """Prints the costs."""
    print(f"{'CPU ms of a completion':44}{'median':>9}   range")
    for turns, length in ((2, 32), (8, 512)):
        words = np.random.default_rng(0).integers(100, 200, length - 1).astype(np.int32)
        policy = ScriptedPolicy([np.append(words, llm_gym.load_chat().stop_ids[0])])
        Talks.turns, args = turns, {"max_tokens": 1024, "max_context": 1 << 16}
        with Driver(Talks, policy, env_args=args, max_concurrent=256) as driver:

            def block(driver: Driver = driver, turns: int = turns) -> float:
                began = time.process_time()
                episodes = driver.run(range(2000 // turns), sampling=LONG)
                return 1e3 * (time.process_time() - began) / (len(episodes) * turns)

            print(f"{f'driver, {turns} turns of {length} tokens':44}{median_of(blocks, block)}")
            (episode,) = driver.run(range(1), sampling=LONG)
        tokens = sum(len(t.tokens) for t in episode.trajectories)
        written, outline = len(json.dumps(encode(episode))), len(pickle.dumps(episode.outline(), protocol=5))
        print(f"    {tokens} tokens: {written / tokens:.1f} bytes each in its file; {outline} bytes of outline")
    with subprocess.Popen([sys.executable, __file__, "--answer"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        for context in (256, 4096, 16384, 65536):
            asked = by_http(port, context, max(50, 4_000_000 // (context + 16384)))
            print(f"{f'HTTP and JSON, context of {context}':44}{median_of(blocks, asked)}")
        server.terminate()


def by_http(port: int, context: int, count: int) -> Callable[[], float]:
    """A block of requests to a server that answers at once, 64 at a time."""
    ids = np.random.default_rng(0).integers(0, 150_000, context).astype(np.int32)

    async def go() -> float:
        remote, gate = Remote(f"http://127.0.0.1:{port}"), asyncio.Semaphore(64)

        async def one() -> None:
            async with gate:
                body = request(ids, Sampling(), REPLY, 1)
                read(await remote.call("POST", "/generate", body), Weights("r", 1, 1, 0), "r")

        began = time.process_time()
        await asyncio.gather(*(one() for _ in range(count)))
        spent = time.process_time() - began
        await remote.close()
        return 1e3 * spent / count

    return lambda: asyncio.run(go())


async def answer() -> None:
    """A server that says the same at once, as vLLM would."""
    from aiohttp import web

    entries = [{"token": f"token_id:{i}", "logprob": -0.123456789 - i, "top_logprobs": []} for i in range(REPLY)]
    choice = {"token_ids": list(range(REPLY)), "finish_reason": "stop", "logprobs": {"content": entries}}
    body = json.dumps({"choices": [choice | {"weight_versions": [{"start": 0, "version": "r:1:1:0"}]}]})

    async def handle(asked: web.Request) -> web.Response:
        await asked.read()
        return web.Response(text=body, content_type="application/json")

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


# What is simulated


class Load(NamedTuple):
    """What is asked of the machines."""

    groups: list[list[float]]  # seconds of the episodes of recorded groups, over their mean
    episodes: int  # admitted at once: being played, or waiting for their step
    seconds: float
    turns: int
    cost: float  # CPU-seconds of a completion for its driver
    learner: float


def recorded(run: Path) -> list[list[float]]:
    """The groups of a run."""
    folder, found = RunFolder(run), defaultdict(list)
    for step in folder.steps_played():
        for episode in folder.read_episodes(f"step_{step:06d}"):
            found[step, episode.seed].append(episode.seconds)
    mean = statistics.mean(value for group in found.values() for value in group)
    return [[value / mean for value in group] for group in found.values()]


def simulate(load: Load, bound: int, drivers: int) -> tuple[float, float, float, float, float]:
    """Share of the episodes that is being played, completions a second, share of the drivers' time, seconds of a step
    and the share of them that the learner waits, once it is steady."""
    draw, skipped, steps = random.Random(0), 1 + bound, 3 * (1 + bound) + 1
    per_step = max(1, load.episodes // (GROUP * (1 + bound)))
    scheduler, learn = Scheduler(per_step, bound), load.learner * load.seconds / (1 + bound)
    free, done, played, last = [0.0] * drivers, 0, 0.0, 0.0
    left: dict[int, int] = {}
    turn: dict[int, tuple[float, int]] = {}
    queue: list[tuple[float, int]] = []
    step = whole = 0
    seen: list[tuple[float, int, float, float]] = []
    idle, waited, learning = 0.0, 0.0, False

    def begin(now: float) -> None:
        for number in scheduler.begin(step, len(seen)):
            kind = draw.choice(load.groups)
            left[number] = GROUP
            for member in range(GROUP):
                each = load.seconds * kind[member % len(kind)] / load.turns
                turn[number * GROUP + member] = (each, load.turns)
                heapq.heappush(queue, (now + each, number * GROUP + member))

    begin(0.0)
    while len(seen) < steps:
        now, who = heapq.heappop(queue)
        played, last = played + len(turn) * (now - last), now
        if who < 0:  # the learner is done, and the engines have its weights
            learning, idle = False, now
            seen.append((now, done, played, waited))
            begin(now)
        else:
            each, more = turn.pop(who)
            if more:
                at = free[who % drivers] = max(free[who % drivers], now) + load.cost
                done += 1
                turn[who] = (each, more - 1)
                heapq.heappush(queue, (at + each * (more > 1), who))
            else:
                left[who // GROUP] -= 1
                whole += not left[who // GROUP] and who // GROUP < scheduler.head + per_step
        if whole == per_step and not learning:
            waited += now - idle
            scheduler.end(per_step)
            step, learning = step + 1, True
            whole = sum(not left[n] for n in range(scheduler.head, min(scheduler.cursor, scheduler.head + per_step)))
            begin(now)
            heapq.heappush(queue, (now + learn, -1))
    span, made, busy, lost = (b - a for a, b in zip(seen[skipped], seen[-1], strict=True))
    rate = made / span
    return busy / span / load.episodes, rate, rate * load.cost / drivers, span / (steps - 1 - skipped), lost / span


def table(load: Load) -> None:
    """The table of bounds and driver processes."""
    print(f"{load.episodes:,} episodes ask for {load.episodes * load.turns / load.seconds:,.0f} completions a second")
    print("".join(f"{name:>9}" for name in ("bound", "drivers", "played", "made/s", "busy", "step s", "waits")))
    for bound, drivers in ((1, 8), (4, 8), (8, 8), (2, 8), (2, 6), (2, 4), (2, 2), (2, 1)):
        share, rate, busy, step, waits = simulate(load, bound, drivers)
        print(f"{bound:9}{drivers:9}{share:9.0%}{rate:9,.0f}{busy:9.0%}{step:9,.0f}{waits:9.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a run folder, for the spread of latencies")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="mean of an episode")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--learner", type=float, default=0.8)
    parser.add_argument("--cost", type=float, default=2.0, help="CPU ms of a completion for its driver, HTTP included")
    words = parser.parse_args()
    if words.answer:
        asyncio.run(answer())
    elif words.measure or words.run is None:
        measure(words.blocks)
    else:
        groups = recorded(words.run)
        table(Load(groups, words.episodes, words.seconds, words.turns, words.cost / 1e3, words.learner))


if __name__ == "__main__":
    main()
