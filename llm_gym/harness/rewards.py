"""The rewards of a step as arrays: what advantages are computed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_gym.core import Episode, Group

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rewards:
    """P tasks of G episodes each; every array float64. NaN marks an episode that failed for no fault of the policy."""

    returns: Floats
    """Weighted return of every episode, [P, G]."""
    turns: Floats
    """Weighted reward of every turn, [P, G, T]; NaN behind the last one. They sum to the return."""
    components: Floats
    """Named parts of the return before weighting, [P, G, C]."""
    names: tuple[str, ...]
    """What the components are called, C names."""
    weights: Floats
    """What each component weighs in the return, [C]."""


def rewards_of(
    groups: Sequence[Group], *, weights: Mapping[str, float] | None = None, limit: int = 0, overlong: float = 0.0
) -> Rewards:
    """Collects what the environment gave, less the penalty for completions near the limit.

    Args:
        groups: P groups of G episodes.
        weights: the environment's `reward_weights`; a name that is not in it weighs 1.
        limit: most tokens of a completion.
        overlong: share of the limit over which the penalty grows (see `overlong_penalty`); 0: none. It is a
            component of its own, `overlong`.
    """
    size, longest = len(groups[0].episodes), max((len(e.turns) for g in groups for e in g.episodes), default=0)
    shape = (len(groups), size)
    names = tuple(sorted({name for g in groups for e in g.episodes for name in e.rewards}))
    names += ("overlong",) if overlong else ()
    turns = np.full((*shape, longest), np.nan)
    components = np.full((*shape, len(names)), np.nan)
    returns = np.full(shape, np.nan)
    for at in np.ndindex(shape):
        episode = groups[at[0]].episodes[at[1]]
        if episode.stop_reason.failed:
            continue
        penalties = _penalties(episode, limit, overlong)
        turns[at][: len(episode.turns)] = [turn.reward for turn in episode.turns] + penalties
        parts = {**episode.rewards, "overlong": float(penalties.sum())}
        components[at] = [parts.get(name, 0.0) for name in names]
        returns[at] = episode.reward + float(penalties.sum())
    scale = {**(weights or {}), "overlong": 1.0}
    return Rewards(returns, turns, components, names, np.array([scale.get(name, 1.0) for name in names], np.float64))


def overlong_penalty(lengths: npt.NDArray[np.int64], limit: int, share: float) -> Floats:
    """0 up to (1 - share) * limit tokens, then falling linearly to -1 at the limit.

    DAPO's soft overlong punishment, eq. 13 of https://arxiv.org/abs/2503.14476 (there: 4096 of 20480 tokens, 0.2).
    """
    return -np.clip((lengths - (1 - share) * limit) / (share * limit), 0.0, 1.0)


def _penalties(episode: Episode, limit: int, share: float) -> Floats:
    """The penalty of each turn's completion."""
    lengths = np.array([len(turn.completion.tokens) for turn in episode.turns], np.int64)
    return overlong_penalty(lengths, limit, share) if share else np.zeros(len(lengths))
