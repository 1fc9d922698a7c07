"""What rollouts ahead of the learner save: a step's time against that of a run that waits, with tools that sleep.

    python benchmarks/async_step.py [--engine vllm] [--bound 2] [--mean 0.2] [--blocks 5] [--engines 2]

Two turns an episode; the first is answered after a sleep that is drawn from the text (log-normal, of that mean). Blocks
of steps of a synchronous run and of one with `stream.max_staleness` alternate; medians of the steps, the first three of
each block left out (nothing was begun ahead of them). With `--engines` both are on a Ray cluster of this machine, with
a player each; the synchronous run has one engine, the other as many as that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium

from llm_gym.env import Reply
from llm_gym.envs.arithmetic import Arithmetic
from llm_gym.envs.grading import verify
from llm_gym.harness import TrainConfig, Trainer

SKIPPED = 3


class SlowSums(Arithmetic):
    """A sum with two tries; what comes between them takes its time."""

    def __init__(self, *, mean: float = 0.2, sigma: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.mean, self.sigma = mean, sigma
        self.metadata = {**self.metadata, "blocking": mean > 0}

    def open(self) -> Any:
        self.tries = 0
        return super().open()

    def reply(self, text: str) -> Reply:
        self.tries += 1
        if self.tries == 2:
            return Reply(reward={"correct": verify(self._gold, text, kind="number").score}, done=True)
        if self.mean:
            key = hashlib.blake2b(f"{text}{self.problem}".encode(), digest_size=8).digest()
            drawn = random.Random(key).lognormvariate(math.log(self.mean) - self.sigma**2 / 2, self.sigma)
            time.sleep(drawn)
        return Reply(messages=[{"role": "user", "content": self.problem.question}])


gymnasium.register("slow/Sums-v0", entry_point=SlowSums)


def block(bound: int, words: argparse.Namespace) -> list[dict[str, Any]]:
    """The steady steps of a run."""
    placed = {"backend": "ray", "engines": words.engines if bound else 1, "players": 1} if words.engines else {}
    vllm = {"kv_cache_memory_bytes": 1 << 28} if words.engine == "vllm" else {}
    config = TrainConfig(
        env="slow/Sums-v0",
        env_args={"mean": words.mean},
        steps=words.steps + SKIPPED,
        prompts_per_step=words.prompts,
        group_size=8,
        policy={"engine": words.engine, "vllm": vllm},
        eval={"every": 0, "episodes": 0},
        checkpoint={"every": 0},
        stream={"max_staleness": bound},
        cluster=placed,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = Trainer(config, out=Path(folder) / "run", observer=object()).train()
    return rows[1 + SKIPPED :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--bound", type=int, default=2)
    parser.add_argument("--mean", type=float, default=0.2, help="seconds that a tool sleeps; 0: none")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a block, those that are left out not counted")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--engines", type=int, default=0, help="of the run ahead, on a Ray cluster; 0: no cluster")
    words = parser.parse_args()
    steps: dict[int, list[float]] = {0: [], words.bound: []}
    rows: list[dict[str, Any]] = []
    for number in range(words.blocks):
        for bound in (0, words.bound) if number % 2 == 0 else (words.bound, 0):
            made = block(bound, words)
            steps[bound] += [row["time/step"] for row in made]
            rows += made if bound else []
            print(f"block {number}, bound {bound}: {statistics.median(steps[bound]):.2f} s", flush=True)
    wait, ahead = (statistics.median(steps[bound]) for bound in (0, words.bound))
    told = {
        "synchronous_s": round(wait, 3),
        "ahead_s": round(ahead, 3),
        "ratio": round(ahead / wait, 2),
        "waited_s": round(statistics.median(row["stream/wait"] for row in rows), 3),
        "staleness_max": max(row["stream/staleness_max"] for row in rows),
    }
    print(json.dumps(vars(words) | told))


if __name__ == "__main__":
    main()
