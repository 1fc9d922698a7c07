"""Uneven multi-turn episodes on a vLLM engine in process: our rollout beside the raw engine, and beside lockstep.

    OMP_NUM_THREADS=1 python benchmarks/uneven.py [--blocks 9] [--episodes 64]

Every episode has 1 to 6 turns. Each turn has its own exact number of tokens (log-normal, median 16, from 4 to 256;
stop tokens are ignored), and between two turns a tool takes from 0 to 300 ms (Lomax: half of the calls below 20 ms,
one in sixteen at the limit). The seed of an episode decides all of it, so every way generates the same tokens:

- raw: the engine alone, stepped in a loop. The contexts are known beforehand; an episode's next turn joins at the
  first step after its tool is ready. No environment, no text, no asyncio, no other thread: the delays overlap
  perfectly. It asks for the same as we do: log-probabilities, a seed per request.
- ours: `llm_gym.rollout` over `VLLMPolicy`; the environment blocks in `time.sleep`, in one thread each.
- lockstep: every turn waits for all: generate for the live episodes, then all their tools at once, in threads.
- serial: lockstep with one tool after the other, as a plain loop over environments does.
- raw, no tools / ours, no tools: the same with tools that take no time.

The ways alternate within one run, on one engine, each from an empty prefix cache. `raw` runs twice in every block:
the second beside the first is the noise of the machine. Ratios are medians over blocks of the ratio within a block.
CPU seconds are those of the whole process; they say what a way costs when other work disturbs the wall clock.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.utils.seeding import np_random

import llm_gym
from llm_gym.core import Completion, Episode, Ids, Sampling
from llm_gym.policies.vllm.policy import VLLMPolicy, _params

TURNS, TOKENS, SECONDS = 6, (4, 256), 0.3
LIMIT = Sampling(max_tokens=TOKENS[1] + 1)
NO_TOOLS = ", no tools"


@dataclass(frozen=True)
class Turn:
    """What an episode's seed says about one turn."""

    tokens: int
    delay: float
    """Seconds that the tool takes after it; nobody waits after the last."""


def draw(rng: np.random.Generator) -> list[Turn]:
    """The turns of one episode."""
    count = int(rng.integers(1, TURNS + 1))
    tokens = np.clip(rng.lognormal(np.log(16), 1.2, count), *TOKENS).astype(int)
    delays = np.minimum(SECONDS, 0.02 * rng.pareto(1.0, count))
    return [Turn(int(n), float(delay)) for n, delay in zip(tokens, delays, strict=True)]


class Uneven(llm_gym.TextEnv):
    """Plays the turns that its seed says; `pace` multiplies the time of its tool."""

    metadata = llm_gym.TextEnv.metadata | {"blocking": True}

    def __init__(self, pace: float = 1.0) -> None:
        super().__init__()
        self.pace = pace

    def open(self) -> list[dict[str, Any]]:
        self.turns = draw(self.np_random)
        self.max_tokens = self.turns[0].tokens + 1  # room for one more: nothing is cut, it just ends
        return [{"role": "user", "content": "Look it up for me, please. " * int(self.np_random.integers(1, 5))}]

    def reply(self, text: str) -> llm_gym.Reply:
        turn = self.turns.pop(0)
        if not self.turns:
            return llm_gym.Reply(reward=1.0, done=True)
        if self.pace:
            time.sleep(self.pace * turn.delay)
        found = "I found this and that. " * int(self.np_random.integers(1, 4))
        return llm_gym.Reply([{"role": "user", "content": found}])

    def step(self, action: Ids) -> tuple[Ids, float, bool, bool, dict[str, Any]]:
        result = super().step(action)
        if self.turns:
            self.max_tokens = self.turns[0].tokens + 1
        return result


class Exact(VLLMPolicy):
    """Samples one token less than the limit, whatever the tokens are, and calls that a stop."""

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        exact = replace(sampling, max_tokens=sampling.max_tokens - 1, stop_token_ids=())
        return replace(await super().complete(context, exact, seed=seed), finish_reason="stop")


def ours(policy: Exact, seeds: range, pace: float) -> tuple[int, list[Episode]]:
    """Our rollout; tokens sampled, and the episodes."""
    episodes = llm_gym.rollout(Uneven, policy, seeds=seeds, sampling=LIMIT, env_args={"pace": pace})
    if errors := [episode.error for episode in episodes if episode.error]:
        raise RuntimeError(errors[0])
    return sum(episode.tokens_generated for episode in episodes), episodes


def lockstep(policy: Exact, seeds: range, pool: ThreadPoolExecutor | None) -> int:
    """All episodes turn by turn, the tools in the pool's threads or one after the other; tokens sampled."""
    live = [Uneven() for _ in seeds]
    contexts = [env.reset(seed=seed)[0] for seed, env in zip(seeds, live, strict=True)]
    tokens = 0

    async def generate() -> list[Completion]:
        requests = zip(live, contexts, strict=True)
        return await asyncio.gather(
            *(policy.complete(context, Sampling(max_tokens=env.max_tokens), seed=7) for env, context in requests)
        )

    while live:
        actions = [completion.tokens for completion in asyncio.run(generate())]
        tokens += sum(map(len, actions))
        step: Any = Uneven.step
        results = list((pool.map if pool else map)(step, live, actions))
        going = [(env, result[0]) for env, result in zip(live, results, strict=True) if not result[2]]
        live, contexts = [env for env, _ in going], [context for _, context in going]
    return tokens


@dataclass(frozen=True)
class Script:
    """An episode as the raw engine plays it."""

    opening: list[int]
    turns: list[Turn]
    extensions: list[list[int]]
    """What the environment puts behind each completion but the last."""


def script(episode: Episode) -> Script:
    """An episode that was played, as a script."""
    pairs = zip(episode.turns, episode.turns[1:], strict=False)
    after = [b.prompt[len(a.prompt) + len(a.completion.tokens) :].tolist() for a, b in pairs]
    return Script(episode.turns[0].prompt.tolist(), draw(np_random(episode.seed)[0]), after)


def raw(scripts: list[Script], pace: float, engine: Any) -> int:
    """The engine stepped in a loop, on its own thread; tokens sampled."""
    from vllm.inputs.engine import tokens_input

    def add(index: int, turn: int, context: list[int]) -> None:
        tokens = scripts[index].turns[turn].tokens
        params = _params(Sampling(stop_token_ids=()), tokens, index * TURNS + turn)
        engine.add_request(f"{index} {turn}", tokens_input(context), params)

    ready = [(0.0, index, 0, one.opening) for index, one in enumerate(scripts)]
    tokens = 0
    while ready or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, ready[0][0] - time.perf_counter()))
        while ready and ready[0][0] <= time.perf_counter():
            add(*heapq.heappop(ready)[1:])
        for output in engine.step():
            if output.finished:
                index, turn = map(int, output.request_id.split())
                sampled = output.outputs[0].token_ids
                tokens += len(sampled)
                one = scripts[index]
                if turn + 1 < len(one.turns):
                    context = [*output.prompt_token_ids, *sampled, *one.extensions[turn]]
                    at = time.perf_counter() + pace * one.turns[turn].delay
                    heapq.heappush(ready, (at, index, turn + 1, context))
    return tokens


def on_engine(policy: Exact, function: Callable[[Any], Any]) -> Any:
    """`function(engine)` on the engine's thread."""
    return policy.thread.call(function).result()


def ways(policy: Exact, seeds: range, pool: ThreadPoolExecutor) -> dict[str, Callable[[], int]]:
    """Name -> what plays all episodes and counts the tokens; those played first warm everything up."""
    scripts = [script(episode) for episode in ours(policy, seeds, 0.0)[1]]
    table: dict[str, Callable[[], int]] = {}
    for words, pace in (("", 1.0), (NO_TOOLS, 0.0)):
        table[f"raw{words}"] = partial(on_engine, policy, partial(raw, scripts, pace))
        table[f"ours{words}"] = lambda pace=pace: ours(policy, seeds, pace)[0]  # type: ignore[misc]
        table[f"raw again{words}"] = table[f"raw{words}"]
    table["lockstep"] = partial(lockstep, policy, seeds, pool)
    table["serial"] = partial(lockstep, policy, seeds, None)
    return table


def measure(policy: Exact, work: Callable[[], int]) -> tuple[float, float, int]:
    """Seconds and CPU seconds from an empty prefix cache, and tokens sampled."""
    on_engine(policy, lambda engine: engine.reset_prefix_cache())
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def report(blocks: dict[str, list[tuple[float, float]]], tokens: int) -> None:
    """The table: medians, the spread of the wall time, and ratios to `raw` and to `ours` of the same tools."""
    print(f"{'':20}{'seconds':>9}{'least':>8}{'most':>8}{'CPU':>8}{'tokens/s':>10}{'/ raw':>8}{'CPU':>6}{'/ ours':>8}")
    walls, cpus = ({name: [pair[i] for pair in pairs] for name, pairs in blocks.items()} for i in (0, 1))

    def ratio(of: dict[str, list[float]], name: str, side: str) -> float:
        base = side + NO_TOOLS * name.endswith(NO_TOOLS)
        return statistics.median(a / b for a, b in zip(of[name], of[base], strict=True))

    for name, times in walls.items():
        middle, cpu = statistics.median(times), statistics.median(cpus[name])
        print(
            f"{name:20}{middle:>9.3f}{min(times):>8.3f}{max(times):>8.3f}{cpu:>8.3f}{tokens / middle:>10.0f}"
            f"{ratio(walls, name, 'raw'):>8.2f}{ratio(cpus, name, 'raw'):>6.2f}{ratio(walls, name, 'ours'):>8.2f}"
        )


def plays(policy: Exact, seeds: range, blocks: int, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """Name of the way -> its (seconds, CPU seconds) in each block.

    Raises:
        RuntimeError: a way did not sample `tokens` tokens.
    """
    taken: dict[str, list[tuple[float, float]]] = {}
    with ThreadPoolExecutor(len(seeds)) as pool:
        table = ways(policy, seeds, pool)
        for name, work in list(table.items()) * blocks:
            wall, cpu, sampled = measure(policy, work)
            if sampled != tokens:
                raise RuntimeError(f"{name} sampled {sampled} tokens instead of {tokens}")
            taken.setdefault(name, []).append((wall, cpu))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--episodes", type=int, default=64)
    arguments = parser.parse_args()
    seeds = range(arguments.episodes)
    plans = [draw(np_random(seed)[0]) for seed in seeds]
    tokens = sum(turn.tokens for plan in plans for turn in plan)
    policy = Exact(None, dtype="float32")
    try:
        blocks = plays(policy, seeds, arguments.blocks, tokens)
    finally:
        policy.close()
    print(
        f"{len(plans)} episodes, {sum(map(len, plans))} turns, {tokens} tokens in every way; tools "
        f"{sum(turn.delay for plan in plans for turn in plan[:-1]):.1f} s in all; {arguments.blocks} blocks; "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, torch threads {torch.get_num_threads()}"
    )
    report(blocks, tokens)


if __name__ == "__main__":
    main()
