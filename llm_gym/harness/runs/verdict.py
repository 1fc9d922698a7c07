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


ALARMS: Mapping[str, tuple[float, str]] = {
    "tools/error_fraction": (
        0.5,
        "{:.0%} of the calls of tools were answered with an error: look at what they say in the report, and try one by "
        "hand.",
    ),
    "episode/reward_failed_fraction": (
        0.1,
        "the reward failed on {:.0%} of the episodes, which are then left out: look at their errors in the run's "
        "episodes, and mend the reward.",
    ),
    "episode/failed_fraction": (
        0.5,
        "{:.0%} of the episodes failed, and are left out: look at their errors in the run's episodes.",
    ),
    "episode/bad_reply_fraction": (
        0.5,
        "{:.0%} of the replies scored 0 because the scorer could make nothing of them: look at their errors in the "
        "run's episodes, and say in the prompt which form is wanted.",
    ),
    "episode/cut_fraction": (
        0.5,
        "{:.0%} of the episodes were cut by length or time: raise sampling.max_tokens, the environment's max_tokens or "
        "max_context, or time_limit, or ask for shorter replies.",
    ),
}
"""Metric of a step -> the share from which on a person is warned, and in which words."""


def alarms(row: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with a step's episodes, whatever they teach: metric -> a sentence."""
    found = {name: row[name] for name in ALARMS if row.get(name) is not None}
    if found.get("episode/reward_failed_fraction", 0.0) >= ALARMS["episode/reward_failed_fraction"][0]:
        found.pop("episode/failed_fraction", None)  # the same episodes
    return {name: ALARMS[name][1].format(share) for name, share in found.items() if share >= ALARMS[name][0]}


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What went wrong in a run, and what to try: with its episodes, on the mean of all steps, and in what it learned.

    Args:
        rows: of metrics.jsonl.
    """
    steps = [row for row in rows if row.get("step")]
    known = {name: [row[name] for row in steps if row.get(name) is not None] for name in ALARMS}
    told = alarms({name: float(np.mean(values)) for name, values in known.items() if values})
    return [f"{text[0].upper()}{text[1:]}" for text in told.values()] + _untaught(rows)


def _untaught(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run of reinforcement learning lacked, and what to try; nothing of one that learned, or is short.

    The mean training reward of the last third of the steps is compared with that of the first, each with the
    standard error that its steps show.
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
