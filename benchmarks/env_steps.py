"""Environment steps per CPU-second: Arithmetic-v0 and GSM8K-v0 in one process, beside grading by math-verify.

    OMP_NUM_THREADS=1 python benchmarks/env_steps.py [--gsm8k FILE] [--seconds 1] [--blocks 5]

An episode step is `reset(seed)` and one `step` with a scripted reply: drawing the task, rendering and encoding
its context, decoding and grading the reply are included; the policy (and encoding its replies) is not. "group
of 8" resets every seed eight times, as GRPO does; "new tasks" resets each seed once, so no context comes from
the cache. The baseline is what GEM's math environment spends its step on: parsing and comparing with
math-verify, here alone, with no environment around it. Blocks alternate; the table gives medians.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium

import llm_gym  # noqa: F401 (registers the environments)
from llm_gym.envs.arithmetic import Problem, worked
from llm_gym.envs.rows import load_rows

SHARED = Path(os.environ.get("LLM_GYM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GROUP = 8


def replies_to(name: str, dataset: str) -> tuple[list[str], list[str]]:
    """(replies, references) of 64 tasks."""
    if name == "Arithmetic-v0":
        problems = [Problem(10 + i, "+", 99 - i) for i in range(64)]
        return [worked(p) for p in problems], [str(p.answer) for p in problems]
    answers = [row["answer"] for row in load_rows(dataset, "train[:64]", sample="gsm8k.jsonl")]
    return answers, [answer.rpartition("####")[2].strip() for answer in answers]


def episodes(name: str, replies: list[str], group: int, checker: bool, **kwargs: Any) -> Callable[[], None]:
    """A function that plays one episode."""
    env = gymnasium.make(f"llm_gym/{name}", disable_env_checker=not checker, **kwargs)
    actions = itertools.cycle([env.unwrapped.chat.encode_reply(reply) for reply in replies])  # type: ignore[attr-defined]
    seeds: Iterator[int] = itertools.chain.from_iterable(itertools.repeat(seed, group) for seed in itertools.count())

    def one() -> None:
        env.reset(seed=next(seeds))
        _, _, terminated, *_ = env.step(next(actions))
        assert terminated

    return one


def math_verify_grading(replies: list[str], references: list[str]) -> Callable[[], None]:
    """A function that grades one reply with math-verify."""
    from math_verify import parse, verify

    pairs = itertools.cycle([(f"\\boxed{{{gold}}}", reply) for gold, reply in zip(references, replies, strict=True)])

    def one() -> None:
        gold, reply = next(pairs)
        assert verify(parse(gold), parse(reply))

    return one


def rate(one: Callable[[], None], seconds: float) -> float:
    """Calls per second of CPU time, which on a quiet machine is wall time: one thread does everything."""
    count, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        for _ in range(20):
            one()
        count += 20
    return count / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    local = SHARED / "data/gsm8k/train.jsonl"
    parser.add_argument("--gsm8k", default=str(local) if local.exists() else "sample", help="GSM8K file, or sample")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each kind")
    options = parser.parse_args()
    print(
        f"GSM8K problems from {Path(options.gsm8k).name}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )
    print(f"{'':16}{'what':34}{'per second':>12}{'x math-verify':>15}")
    for name in ("Arithmetic-v0", "GSM8K-v0"):
        data = {"dataset": options.gsm8k, "max_tokens": 2048} if name == "GSM8K-v0" else {}
        replies, references = replies_to(name, options.gsm8k)
        cases = {
            "math-verify, grading alone": math_verify_grading(replies, references),
            f"group of {GROUP}": episodes(name, replies, GROUP, False, **data),
            f"group of {GROUP}, Gymnasium's checker on": episodes(name, replies, GROUP, True, **data),
            "new tasks": episodes(name, replies, 1, False, **data),
        }
        rates: dict[str, list[float]] = {what: [] for what in cases}
        for _, (what, one) in itertools.product(range(options.blocks), cases.items()):
            rates[what].append(rate(one, options.seconds))
        medians = {what: statistics.median(values) for what, values in rates.items()}
        base = next(iter(medians.values()))
        for what, value in medians.items():
            print(f"{name:16}{what:34}{value:15,.0f}{value / base:15.1f}")


if __name__ == "__main__":
    main()
