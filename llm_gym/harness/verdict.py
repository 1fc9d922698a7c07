"""Whether a run has taught anything, read from its own metrics: a sentence for each thing wrong, and what to try."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOVED = "policy/kl_from_start"
"""Metric: KL(policy at the start || policy), nats a token, on what the first step sampled."""
STILL = 1e-4
"""A policy that is no farther from its start (nats) has not moved: a run that learns is a hundred times as far."""
LEAST = 15
"""A run of fewer steps is not judged: five for each third are the least that tell their own noise."""
SURE = 3.0
"""Standard errors by which two thirds must differ."""
ALIKE = 0.9
"""Share of groups without spread from which on there was nothing to compare."""


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong in a run of reinforcement learning, and what to try; nothing of one that learned, or is short.

    The mean training reward of the last third of the steps is compared with that of the first, each with the
    standard error that its steps show.

    Args:
        rows: of metrics.jsonl.
    """
    trained = [row for row in rows if row.get("policy/lr") is not None and row.get("reward/mean") is not None]
    if len(trained) < LEAST or any("distill/kl" in row for row in trained):
        return []
    rewards = np.array([row["reward/mean"] for row in trained], np.float64)
    first, _, last = np.array_split(rewards, 3)
    rise = float(last.mean() - first.mean())
    noise = math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    ends = f"{first.mean():.3f} in the first third of the steps, {last.mean():.3f} in the last"
    if rise < -SURE * noise:
        return [
            f"The training reward fell ({ends}): the steps are too large, or the problems became harder; try a "
            f"smaller optimizer.lr (it was {_rate(trained):g}), or a pull to the start (loss.kl=k3,"
            " loss.kl_weight=0.05)."
        ]
    if rise > SURE * noise or _rose(rows):
        return []
    spread = [row["groups/zero_spread"] for row in trained if row.get("groups/zero_spread") is not None]
    if spread and (alike := float(np.mean(spread))) >= ALIKE:
        return [
            f"In {alike:.0%} of the groups all episodes earned the same, so that there was nothing to learn from "
            f"(reward {last.mean():.3f}): try harder or easier problems, a finer reward, or a larger group_size."
        ]
    moved = next((row[MOVED] for row in reversed(rows) if row.get(MOVED) is not None), None)
    if moved is not None and moved < STILL:
        return [
            f"The policy has not moved ({moved:.1e} nats a token from its start; reward {ends}): try an optimizer.lr "
            f"ten times as large (it was {_rate(trained):g})."
        ]
    return [
        f"The training reward did not rise beyond its noise ({ends}, give or take {noise:.3f}): try another "
        f"optimizer.lr (it was {_rate(trained):g}), more steps, or more episodes a step (prompts_per_step, group_size)."
    ]


def _rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The peak learning rate."""
    return max(float(row["policy/lr"]) for row in rows)


def _rose(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last evaluation's interval of the sampled reward lies above the first's."""
    low, high = "eval/sampled_reward_low", "eval/sampled_reward_high"
    seen = [row for row in rows if row.get(low) is not None and row.get(high) is not None]
    return len(seen) > 1 and seen[-1][low] > seen[0][high]
