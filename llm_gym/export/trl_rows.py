"""Episodes as what TRL's `rollout_func` returns: token ids, log-probabilities and the mask of what was sampled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from llm_gym.core import Episode


def columns(episodes: Iterable[Episode], end: int) -> dict[str, list[Any]]:
    """A column for each thing that TRL and reward functions are told, a row for each episode.

    Args:
        episodes: they, in the order of the prompts.
        end: any token, for episodes in which nothing was sampled.
    """
    rows = [_row(episode, end) for episode in episodes]
    return {name: [row[name] for row in rows] for name in rows[0]}


def line(episode: Episode, number: int) -> list[Any]:
    """A trajectory from its root on: ids [n], which of them were sampled and may be trained [n], log-probabilities [n].

    What was sampled before a branch is trained too: it stands behind the same context.
    """
    own = episode.trajectories[number]
    trained, logprobs = np.zeros(len(own.tokens), bool), np.zeros(len(own.tokens), np.float32)
    trained[own.sampled], logprobs[own.sampled] = own.of_tokens("trained"), own.logprobs
    if own.parent is None:
        return [own.tokens, trained, logprobs]
    before = line(episode, own.parent[0])
    return [
        np.concatenate([a[: own.parent[1]], b]) for a, b in zip(before, (own.tokens, trained, logprobs), strict=True)
    ]


def _row(episode: Episode, end: int) -> dict[str, Any]:
    """One episode. One that failed keeps its place in its group: its reward is NaN, and no token of it is trained."""
    failed = episode.stop_reason.failed
    if episode.spans:
        tokens, trained, logprobs = line(episode, episode.spans[-1][0])
        if len(episode.trajectories) > 1:
            _warn(episode.env_id)
    else:
        tokens, trained, logprobs = np.array([end, end]), np.array([False, True]), np.zeros(2, np.float32)
    first = int(trained.argmax()) or 1  # TRL needs a prompt
    return {
        "prompt_ids": tokens[:first].tolist(),
        "completion_ids": tokens[first:].tolist(),
        "logprobs": logprobs[first:].tolist(),
        "env_mask": [int(each and not failed) for each in trained[first:]],
        "episode_reward": float("nan") if failed else episode.reward,
        "rewards": dict(episode.rewards),
        "stop_reason": str(episode.stop_reason),
        "error": episode.error,
    }


@cache
def _warn(env_id: str) -> None:
    """Says once what of a branched episode is left out."""
    text = f"{env_id}: episodes are rewritten or branched; TRL trains one sequence of each, that on which it ended."
    warnings.warn(text, stacklevel=2)
