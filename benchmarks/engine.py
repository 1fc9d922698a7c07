"""The built-in engine beside transformers' own `generate`: sampled tokens per CPU-second, embedded model.

    OMP_NUM_THREADS=1 python benchmarks/engine.py [--blocks 5]

Four shapes of work; blocks alternate between the two sides, and the table gives medians over blocks. `generate`
gets every advantage: it returns no log-probabilities (the engine does), and its prompts are already tensors.

- even: 64 different prompts of 40 tokens, 128 new tokens each, nothing ever stops. No row could be dropped and
  nothing shared, so this is forward against forward.
- uneven: 64 prompts of 8 to 120 tokens, otherwise the same.
- group: 16 prompts, 8 completions of each, ending at a stop token (8 of the 576 ids) or after 128 tokens.
- turns: 64 episodes of 1 to 5 turns, ending likewise. `generate` works in lockstep, as trainers without an
  asynchronous driver do: each round feeds every live context from its beginning and waits for the longest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import llm_gym
from llm_gym.core import Ids, Sampling
from llm_gym.policies.builtin.policy import TransformersPolicy
from llm_gym.rollouts.driver import Driver

STOPS = tuple(range(30, 570, 70))
ENDLESS = Sampling(max_tokens=128, stop_token_ids=())
HOT = Sampling(temperature=2.0, max_tokens=128, stop_token_ids=STOPS)
"""Hot enough for the stop tokens to come up at random."""


class Talk(llm_gym.TextEnv):
    """Lasts 1 to 5 turns, whatever is said."""

    def open(self) -> list[dict[str, Any]]:
        self.left = int(self.np_random.integers(1, 6))
        return [{"role": "user", "content": "Talk to me about the weather, please. " * self.left}]

    def reply(self, text: str) -> llm_gym.Reply:
        self.left -= 1
        more = [{"role": "user", "content": "Go on, I am listening. " * int(self.np_random.integers(1, 4))}]
        return llm_gym.Reply(more, reward=1.0, done=self.left == 0)


def generate(model: Any, contexts: list[Ids], sampling: Sampling) -> list[Ids]:
    """Completions by transformers' `generate`, cut after their stop token."""
    width = max(map(len, contexts))
    ids = torch.zeros(len(contexts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):
        ids[row, width - len(context) :] = torch.from_numpy(context)
        mask[row, width - len(context) :] = 1
    stops = sampling.stop_token_ids
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_tokens,
        eos_token_id=list(stops) if stops else None,
        pad_token_id=0,
    )
    cut = []
    for row in out[:, width:].numpy().astype(np.int32):
        ends = np.flatnonzero(np.isin(row, stops or ()))
        cut.append(row[: ends[0] + 1] if len(ends) else row)
    return cut


def lockstep(model: Any, episodes: int) -> int:
    """Plays all episodes round by round; tokens sampled."""
    live = [Talk(max_tokens=HOT.max_tokens) for _ in range(episodes)]
    contexts = [env.reset(seed=seed)[0] for seed, env in enumerate(live)]
    tokens = 0
    while live:
        after = []
        for env, action in zip(live, generate(model, contexts, HOT), strict=True):
            tokens += len(action)
            context, _, terminated, truncated, _ = env.step(action)
            if not (terminated or truncated or action[-1] not in STOPS):
                after.append((env, context))
        live, contexts = [env for env, _ in after], [context for _, context in after]
    return tokens


def cases(policy: TransformersPolicy) -> dict[str, tuple[Callable[[], int], Callable[[], int]]]:
    """Name -> (the engine's side, generate's side); each returns how many tokens it sampled."""
    rng = np.random.default_rng(0)
    model: Any = policy.model

    def prompts(count: int, shortest: int, longest: int) -> list[Ids]:
        return [rng.integers(30, 570, n).astype(np.int32) for n in rng.integers(shortest, longest + 1, count)]

    def pair(contexts: list[Ids], sampling: Sampling) -> tuple[Callable[[], int], Callable[[], int]]:
        def ours() -> int:
            policy.refresh()
            return sum(len(c.tokens) for c in policy.generate(contexts, sampling, seeds=range(len(contexts))))

        return ours, lambda: sum(map(len, generate(model, contexts, sampling)))

    driver = Driver(Talk, policy, sampling=HOT, env_args={"max_tokens": HOT.max_tokens})
    return {
        "even": pair(prompts(64, 40, 40), ENDLESS),
        "uneven": pair(prompts(64, 8, 120), ENDLESS),
        "group": pair([prompt for prompt in prompts(16, 40, 80) for _ in range(8)], HOT),
        "turns": (lambda: sum(e.tokens_generated for e in driver.run(range(64))), lambda: lockstep(model, 64)),
    }


def measure(work: Callable[[], int]) -> float:
    """Tokens per CPU-second of this process."""
    began = time.process_time()
    tokens = work()
    return tokens / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--only", choices=("even", "uneven", "group", "turns"))
    blocks, only = (vars(parser.parse_args())[name] for name in ("blocks", "only"))
    policy = TransformersPolicy(None, device="cpu")
    print(f"torch threads {torch.get_num_threads()}, {blocks} blocks; tokens per CPU-second")
    print(f"{'':8}{'engine':>10}{'generate':>10}{'ratio':>8}")
    for name, (ours, theirs) in cases(policy).items():
        if only not in (None, name):
            continue
        ours(), theirs()
        both = [(measure(ours), measure(theirs)) for _ in range(blocks)]
        ratio = statistics.median(a / b for a, b in both)
        a, b = (statistics.median(side) for side in zip(*both, strict=True))
        print(f"{name:8}{a:>10.0f}{b:>10.0f}{ratio:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
