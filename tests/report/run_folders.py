"""Synthetic run folders, written by the real writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llm_gym.core import Completion, Episode, StopReason, Turn
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.harness.settings import dump
from llm_gym.trajectories import trajectories


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: Any) -> str:
    """Byte-level decoding, as a tokenizer does it: a part of a character becomes U+FFFD."""
    return bytes(tokens).decode("utf-8", "replace")


def episode(seed: int, reply: str, reward: float, *, question: str = "1+1?", tool: str = "", **changes: Any) -> Episode:
    """An episode of one turn, or of two around a tool's text."""
    prompt, said = ids(question), ids(reply)
    turns = [Turn(prompt, Completion(said, np.full(len(said), -0.5, np.float32), "stop"), reward)]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    if tool:
        context = np.concatenate([prompt, said, ids(tool)])
        turns.append(Turn(context, Completion(ids("done"), np.full(4, -3.0, np.float32), "stop"), 0.0))
        messages += [{"role": "tool", "content": tool}, {"role": "assistant", "content": "done"}]
    fields = {"rewards": {"correct": reward}, "messages": tuple(messages)} | changes
    return Episode("llm_gym/Test-v0", seed, trajectories(tuple(turns)), StopReason.ANSWERED, **fields)


def run(path: Path, steps: int = 3, *, evaluated: bool = True) -> RunFolder:
    """A finished run of `steps` steps."""
    folder = RunFolder(path)
    folder.start(dump(TrainConfig()))
    if evaluated:
        folder.log({"step": 0, "eval/greedy_reward": 0.25, "eval/sampled_reward": 0.125})
        folder.write_episodes("eval_000000", [episode(s, f"before {s}", 0.0) for s in range(12)])
        folder.write_episodes(f"eval_{steps:06d}", [episode(s, f"after {s}", float(s != 3)) for s in range(12)])
    for step in range(1, steps + 1):
        row = {"step": step, "reward/mean": step / steps, "policy/entropy": 1 / step, "time/step": 2.0}
        if step == steps and evaluated:
            row |= {"eval/greedy_reward": 0.875, "eval/sampled_reward": 0.625}
        folder.log(row | {"tokens/generated": 1000})
        folder.write_episodes(f"step_{step:06d}", [episode(step, f"try {m}", float(m)) for m in range(2)])
    return folder
