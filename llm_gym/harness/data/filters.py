"""Which groups may be trained on: filters by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.core import Episode, Group
from llm_gym.errors import ConfigError, place
from llm_gym.harness.registry import attempt, by_name

Floats = npt.NDArray[np.float64]
Filter = Callable[[Group, Any], bool]
"""(group, limit) -> whether it may be trained on. Returns and lengths are those of episodes that did not fail."""


def spread(group: Group, limit: float) -> bool:
    """Greatest less smallest return above the limit; 0 leaves out groups that carry no signal."""
    returns = _returns(group)
    return bool(len(returns) and returns.max() - returns.min() > limit)


def min_reward(group: Group, limit: float) -> bool:
    """Mean return at least the limit."""
    return _mean(_returns(group)) >= limit


def max_reward(group: Group, limit: float) -> bool:
    """Mean return at most the limit."""
    return _mean(_returns(group)) <= limit


def min_length(group: Group, limit: float) -> bool:
    """Mean number of sampled tokens at least the limit."""
    return _mean([e.tokens_generated for e in _sound(group)]) >= limit


def max_length(group: Group, limit: float) -> bool:
    """Mean number of sampled tokens at most the limit."""
    return _mean([e.tokens_generated for e in _sound(group)]) <= limit


def distinct(group: Group, limit: float) -> bool:
    """At least so many episodes with different completions (token by token)."""
    said = {tuple(turn.completion.tokens.tobytes() for turn in e.turns) for e in _sound(group)}
    return len(said) >= limit


def sound(group: Group, limit: float) -> bool:
    """At least so many episodes that did not fail."""
    return len(_sound(group)) >= limit


FILTERS: dict[str, Filter] = {
    f.__name__: f for f in (spread, min_reward, max_reward, min_length, max_length, distinct, sound)
}


def filters(chosen: Mapping[str, Any]) -> Mapping[str, Callable[..., bool]]:
    """The filters of a configuration, by name.

    Args:
        chosen: a name in `FILTERS` -> its limit, or `package.module:function` -> what it is given as its limit.

    Raises:
        ConfigError: there is no such filter, or its limit is no number.
    """
    made = {}
    for name, limit in chosen.items():
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and not math.isnan(limit)
        if name in FILTERS and not number:
            raise ConfigError(f"filters.{name}: got {limit!r}, want a number.")
        made[name] = partial(_call, by_name("filters", name, FILTERS), limit)
    return made


def judged(group: Group, chosen: Mapping[str, Callable[..., bool]]) -> Group:
    """The group with the name of the first filter that it does not pass."""
    return replace(group, filtered=next((name for name, passes in chosen.items() if not passes(group)), None))


def _call(function: Filter, limit: Any, group: Group, passing: tuple[type[Exception], ...] = ()) -> bool:
    passed = attempt("filters", function, group, limit, form="(group, limit) -> true or false", passing=passing)
    if np.ndim(passed) or isinstance(passed, str):  # "no" would be true
        raise ConfigError(f"filters: {place(function)} gave {passed!r:.80}, want true or false.")
    return bool(passed)


def _sound(group: Group) -> list[Episode]:
    return [episode for episode in group.episodes if not episode.stop_reason.failed]


def _returns(group: Group) -> Floats:
    returns: Floats = group.rewards
    known: Floats = returns[~np.isnan(returns)]
    return known


def _mean(values: Floats | Sequence[int]) -> float:
    """The mean; NaN (which passes no filter) of nothing."""
    return float(np.mean(values)) if len(values) else math.nan
