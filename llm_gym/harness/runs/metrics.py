"""What a step's episodes say, under the metric names that every run shares."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from llm_gym.core import Episode, StopReason

CUT = (StopReason.TOKEN_LIMIT, StopReason.TIME_LIMIT)
"""Ends of episodes that were cut by length or time."""


def describe(episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards, lengths and ends of episodes; NaN where no episode can say (all failed).

    `episode/failed_fraction` counts the ends that are not the policy's doing, `episode/reward_failed_fraction` those
    among them where the reward function failed; those episodes take no part in the reward metrics. Of the others,
    `episode/cut_fraction` counts those that were cut by length or time, `episode/bad_reply_fraction` those that nothing
    could be made of, and so scored 0.
    """
    sound = [episode for episode in episodes if not episode.stop_reason.failed]
    rewards = np.array([episode.reward for episode in sound])
    names = sorted({name for episode in sound for name in episode.rewards})
    parts = {f"reward/{name}": _mean([e.rewards.get(name, 0.0) for e in sound]) for name in names}
    return {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else float("nan"),
        **parts,
        **_tools(episodes),
        "episode/turns_mean": _mean([len(e.spans) for e in sound]),
        "episode/tokens_mean": _mean([e.tokens_generated for e in sound]),
        "episode/truncated_fraction": _mean([not e.stop_reason.terminated for e in sound]),
        "episode/cut_fraction": _mean([e.stop_reason in CUT for e in sound]),
        "episode/bad_reply_fraction": _mean([e.stop_reason is StopReason.BAD_REPLY for e in sound]),
        "episode/failed_fraction": 1 - len(sound) / len(episodes) if episodes else float("nan"),
        "episode/reward_failed_fraction": _mean([e.stop_reason is StopReason.REWARD_ERROR for e in episodes]),
        "tokens/generated": float(sum(e.tokens_generated for e in episodes)),
    }


def _tools(episodes: Sequence[Episode]) -> dict[str, float]:
    """The share of calls that were answered with an error (refused ones too), where any were made."""
    results = [str(m.get("content")) for e in episodes for m in e.messages if m.get("role") == "tool"]
    return {"tools/error_fraction": _mean([text.startswith("Error") for text in results])} if results else {}


def staleness(episodes: Sequence[Episode], version: int) -> float:
    """How many updates older than `version` the oldest sampled token is."""
    seen = [span.version for episode in episodes for _, span in episode.spans]
    return float(version - min(seen)) if seen else 0.0


def speeds(
    learned: Mapping[str, float], generated: float, times: Mapping[str, float], *, ahead: bool = False
) -> dict[str, float]:
    """Tokens per second of the step's two halves; where rollouts are `ahead` they go on through the whole step."""
    return {
        "tokens_per_second/rollout": generated / times["time/step" if ahead else "time/rollout"],
        "tokens_per_second/train": learned["tokens/trained"] / times["time/train"],
    }


def combine(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One row of learner metrics for a rollout's optimizer steps.

    Means, but: tokens are summed, the learning rate is the last, and `sampler/...` is that of the first step with a
    token to compute, when sampler and learner still had the same weights.
    """
    names = {name: None for update in updates for name in update}
    row = {name: _known_mean([u[name] for u in updates if name in u]) for name in names}
    samplers = [{n: value for n, value in update.items() if n.startswith("sampler/")} for update in updates]
    row |= next((s for s in samplers if not any(map(math.isnan, s.values()))), samplers[0])
    return row | {
        "policy/lr": updates[-1]["policy/lr"],
        "tokens/trained": math.fsum(u["tokens/trained"] for u in updates),
    }


class Times(dict[str, float]):
    """Seconds by name, as `clock` adds them up, and when each of them began and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, float, float]] = []
        """(name, began, ended), on the clock of `time.perf_counter`."""


@contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds spent inside to `times[name]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        ended = time.perf_counter()
        times[name] = times.get(name, 0.0) + ended - started
        if isinstance(times, Times):
            times.spans.append((name, started, ended))


def timeline(step: int, times: Times, groups: Sequence[tuple[int, float, float]], *, since: int = 0) -> dict[str, Any]:
    """A step's row of timeline.jsonl, in seconds since the process began to look at the clock.

    Args:
        step: its number.
        since: steps that were done when the process began: rows of one process have one clock.
        times: of its phases on this rank.
        groups: (number of a task, began, ended) of the groups that it took and that were played ahead.
    """
    phases = {name.removeprefix("time/"): [began, ended] for name, began, ended in times.spans}
    return {"step": step, "since": since, "phases": phases, "groups": [list(group) for group in groups]}


def _known_mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN; NaN if nothing is."""
    return _mean([value for value in values if not math.isnan(value)])


def _mean(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
