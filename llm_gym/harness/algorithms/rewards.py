"""The rewards of a step as arrays: what advantages are computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_gym.core import Episode, Group, StopReason
from llm_gym.errors import RewardError

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
    """What each component weighs in the return of a task's episodes, [P, C]: tasks may be of several environments."""


def rewards_of(
    groups: Sequence[Group],
    *,
    weights: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    limit: int | Sequence[int] = 0,
    overlong: float = 0.0,
) -> Rewards:
    """Collects what the environment gave, less the penalty for completions near the limit.

    Args:
        groups: P groups of G episodes.
        weights: the environment's `reward_weights`; a name that is not in it weighs 1. A list: one for each group.
        limit: most tokens of a completion. A list: one for each group.
        overlong: share of the limit over which the penalty grows (see `overlong_penalty`); 0: none. It is a
            component of its own, `overlong`.
    """
    limits = [limit] * len(groups) if isinstance(limit, int) else limit
    scales = weights if isinstance(weights, Sequence) else [weights or {}] * len(groups)
    size, longest = len(groups[0].episodes), max((len(e.spans) for g in groups for e in g.episodes), default=0)
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
        penalties = _penalties(episode, limits[at[0]], overlong)
        turns[at][: len(penalties)] = [span.reward for _, span in episode.spans] + penalties
        parts = {**episode.rewards, "overlong": float(penalties.sum())}
        components[at] = [parts.get(name, 0.0) for name in names]
        returns[at] = episode.reward + float(penalties.sum())
    scale = [[1.0 if name == "overlong" else weight.get(name, 1.0) for name in names] for weight in scales]
    return Rewards(returns, turns, components, names, np.array(scale, np.float64).reshape(len(groups), len(names)))


class RewardWatch:
    """Stops a run whose reward always fails; a reward that fails now and then only costs those episodes.

    Args:
        tasks: how many tasks of an environment must fail, and nothing else end with a reward, to be sure of it.
    """

    def __init__(self, tasks: int = 2) -> None:
        self._tasks = tasks
        self._given: set[str] = set()
        self._failed: dict[str, dict[int, str]] = {}

    def see(self, episodes: Iterable[Episode]) -> None:
        """Looks at what was played.

        Raises:
            RewardError: an environment whose reward failed each time; says how it failed first.
        """
        for episode in episodes:
            if not episode.stop_reason.failed:
                self._given.add(episode.env_id)
            elif episode.stop_reason is StopReason.REWARD_ERROR:
                self._failed.setdefault(episode.env_id, {}).setdefault(episode.seed, str(episode.error))
        for env_id, errors in self._failed.items():
            if env_id not in self._given and len(errors) >= self._tasks:
                first = next(iter(errors.values())).removeprefix("RewardError: ")
                raise RewardError(f"reward: it failed on each of the first {len(errors)} tasks of {env_id}; {first}")


def overlong_penalty(lengths: npt.NDArray[np.int64], limit: int, share: float) -> Floats:
    """0 up to (1 - share) * limit tokens, then falling linearly to -1 at the limit.

    DAPO's soft overlong punishment, eq. 13 of https://arxiv.org/abs/2503.14476 (there: 4096 of 20480 tokens, 0.2).
    """
    return -np.clip((lengths - (1 - share) * limit) / (share * limit), 0.0, 1.0)


def _penalties(episode: Episode, limit: int, share: float) -> Floats:
    """The penalty of each turn's completion."""
    lengths = np.array([span.stop - span.start for _, span in episode.spans], np.int64)
    return overlong_penalty(lengths, limit, share) if share else np.zeros(len(lengths))
