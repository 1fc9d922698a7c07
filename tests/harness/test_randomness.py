"""Code of a user's that draws from the global generators repeats itself too, also after a resume."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from llm_gym.env import Reply, TextEnv
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.loops.observer import Observer
from llm_gym.harness.randomness import reseed


class Careless(TextEnv):
    """Draws its question and its reward from the global generators, as no environment should."""

    def open(self):
        return [{"role": "user", "content": f"{random.random()} {np.random.random()} {torch.rand(()).item()}"}]

    def reply(self, text: str) -> Reply:
        return Reply(reward=random.random(), done=True)


if "test/Careless-v0" not in gymnasium.registry:
    gymnasium.register("test/Careless-v0", entry_point=Careless)

SMALL = ["eval.episodes=2", "eval.every=2", "prompts_per_step=2", "group_size=2", "sampling.max_tokens=4"]


class Dies(Observer):
    def on_row(self, row) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt


def run(out: Path, *, resume: bool = False, **how) -> tuple[list[dict], list[str]]:
    """Rows and questions of a run of four steps."""
    config = load(TrainConfig, env="test/Careless-v0", sets=[*SMALL, "checkpoint.every=2"], steps=4)
    with contextlib.suppress(KeyboardInterrupt):
        Trainer(config, out=out, resume=resume, **how).train()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_second"))} for row in rows]
    files = sorted((out / "episodes").glob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return rows, [json.loads(line)["messages"][0]["content"] for line in lines]


def test_a_resumed_run_draws_what_the_whole_one_drew(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    random.seed(99)  # whatever else the process has done
    torch.manual_seed(99)
    run(tmp_path / "cut", observer=Dies())
    np.random.seed(98)
    assert run(tmp_path / "cut", resume=True) == whole
    assert len(set(whole[1])) > 8, "steps and episodes differ"


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(()).item()])
def test_every_seed_and_step_has_draws_of_its_own(draw) -> None:
    seen = set()
    for seed in range(8):
        for step in range(8):
            reseed(seed, step)
            first = draw()
            reseed(seed, step)
            assert draw() == first
            seen.add(first)
    assert len(seen) == 64
