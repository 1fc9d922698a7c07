"""Advantages: from the rewards of a step's groups to the credit of each episode, or of each of its turns.

P tasks, G episodes each, T turns, C reward components; all float64. NaN marks an episode that failed for no
fault of the policy: it is left out of every mean and deviation, and its advantage is exactly 0. What carries no
signal (one episode left, no spread, all failed) gets exactly 0, never NaN or an amplified rounding error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np

from llm_gym.errors import ConfigError, place
from llm_gym.harness.algorithms.rewards import Floats, Rewards
from llm_gym.harness.registry import as_numbers, attempt, by_name, want_shape

AdvantageFn = Callable[..., Floats]
"""Rewards -> advantages [P, G], or [P, G, T] for credit by turn (read where the episode has that turn). What a row
of `ADVANTAGES` and a user's own function look like."""

EPS = 1e-4
"""Added to the standard deviation (as TRL and verl do up to a factor), so that tiny spreads stay tiny."""


def group_norm(returns: Floats) -> Floats:
    """(r - mean) / (std + 1e-4) within each group, [P, G]; std is the sample deviation (n - 1).

    GRPO, section 4.1.2 of https://arxiv.org/abs/2402.03300.
    """
    centred, count = _centred(returns)
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.sqrt(np.nansum(centred**2, axis=1, keepdims=True) / (count - 1))
    return _clean(centred / (std + EPS), returns)


def dr_grpo(returns: Floats) -> Floats:
    """r - mean within each group, [P, G]: no division by the spread, which favours too easy and too hard tasks.

    Dr. GRPO, section 3.2 of https://arxiv.org/abs/2503.20783.
    """
    return _clean(_centred(returns)[0], returns)


def rloo(returns: Floats) -> Floats:
    """r - mean of the OTHER episodes of the group, [P, G], an unbiased baseline; equals n/(n-1) * (r - mean).

    RLOO, https://arxiv.org/abs/2402.14740.
    """
    centred, count = _centred(returns)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _clean(centred * (count / (count - 1)), returns)


def reinforce_pp(returns: Floats) -> Floats:
    """(r - mean) / (std + 1e-4) over the whole step, [P, G]: a group without spread still has a signal.

    REINFORCE++, https://arxiv.org/abs/2501.03262 (also called batch normalisation).
    """
    everything = _checked(returns).reshape(1, -1)
    return _clean(_over_batch_std(everything - _mean(everything)), everything).reshape(returns.shape)


def reinforce_pp_baseline(returns: Floats) -> Floats:
    """r - mean within the group, divided by the (std + 1e-4) of that over the whole step, [P, G].

    REINFORCE++ with baseline, https://arxiv.org/abs/2501.03262.
    """
    return _clean(_over_batch_std(_centred(returns)[0]), returns)


def gdpo(components: Floats, weights: Floats) -> Floats:
    """Each component normalised in its group, their weighted sum divided by its (std + 1e-4) over the step, [P, G].

    Sums that are equal but made of different parts stay apart, and no component drowns in another's spread.
    GDPO, https://arxiv.org/abs/2601.05242. The sum's mean over the step is 0 as it stands.

    Args:
        components: [P, G, C], before weighting.
        weights: [C], or [P, C].
    """
    columns = np.broadcast_to(weights, (len(components), components.shape[-1])).T[..., None]  # [C, P, 1]
    parts = [weight * group_norm(part) for weight, part in zip(columns, np.moveaxis(components, -1, 0), strict=True)]
    failed = np.isnan(components).any(axis=-1)
    total = np.where(failed, np.nan, np.sum(parts, axis=0) if parts else 0.0)
    return np.where(failed, 0.0, np.nan_to_num(_over_batch_std(total)))


def turn_norm(turns: Floats) -> Floats:
    """Credit by turn, [P, G, T]: the reward from a turn on, normalised over the group's episodes that had that turn.

    A turn answers for what came after it, not for what came before; with one turn it is `group_norm`. Reward to
    go as in https://arxiv.org/abs/1506.02438 (gamma = lambda = 1), the baseline as in GRPO. The last episode that
    still goes on has nothing to be compared with: advantage 0.

    Args:
        turns: reward of each turn, [P, G, T]; NaN behind the last.
    """
    suffix_sum = np.flip(np.nancumsum(np.flip(turns, axis=-1), axis=-1), axis=-1)
    suffix_sum[np.isnan(turns)] = np.nan
    credit = np.zeros(turns.shape)
    for t in range(turns.shape[-1]):
        credit[..., t] = group_norm(suffix_sum[..., t])
    return credit


def none(returns: Floats) -> Floats:
    """The return itself, [P, G], no baseline: plain REINFORCE."""
    returns = _checked(returns)
    return np.where(np.isnan(returns), 0.0, returns)


ADVANTAGES: dict[str, AdvantageFn] = {
    "group_norm": lambda r: group_norm(r.returns),
    "dr_grpo": lambda r: dr_grpo(r.returns),
    "rloo": lambda r: rloo(r.returns),
    "reinforce_pp": lambda r: reinforce_pp(r.returns),
    "reinforce_pp_baseline": lambda r: reinforce_pp_baseline(r.returns),
    "gdpo": lambda r: gdpo(r.components, r.weights),
    "turn_norm": lambda r: turn_norm(r.turns),
    "none": lambda r: none(r.returns),
}


def advantage(name: str) -> AdvantageFn:
    """The function of that name in `ADVANTAGES`, or the one at `package.module:function`.

    Raises:
        ConfigError: neither.
    """
    fn: AdvantageFn = by_name("advantage", name, ADVANTAGES)
    return fn if name in ADVANTAGES else _shaped(fn)


def _shaped(fn: AdvantageFn) -> AdvantageFn:
    """A user's function, called with care: what it gives must be one finite number for each episode or turn."""

    def checked(rewards: Rewards, passing: tuple[type[Exception], ...] = ()) -> Floats:
        form = "(rewards) -> advantages [P, G] or [P, G, T]"
        found = attempt("advantage", fn, rewards, form=form, passing=passing)
        if found is None and passing:
            return np.zeros(rewards.returns.shape)
        found = as_numbers("advantage", fn, found, "advantages [P, G] or [P, G, T]")
        by_turn = found.ndim == 3
        shape = rewards.turns.shape if by_turn else rewards.returns.shape
        want_shape("advantage", fn, found, shape, "advantages [P, G, T]" if by_turn else "advantages [P, G]")
        known = found[~np.isnan(rewards.turns if by_turn else rewards.returns)]
        if not np.isfinite(known).all():
            raise ConfigError(
                f"advantage: {place(fn)} gave a number that is not finite for an episode that did not fail."
            )
        return np.nan_to_num(found)

    return checked


def _checked(returns: Floats) -> Floats:
    returns = np.asarray(returns, np.float64)
    if returns.ndim != 2 or np.isinf(returns).any():
        raise ValueError(f"rewards: want [P, G], finite or NaN, got shape {returns.shape}.")
    return returns


def _centred(returns: Floats) -> tuple[Floats, Floats]:
    """Deviations from the group mean [P, G] (NaN where failed) and the episodes counted [P, 1]."""
    returns = _checked(returns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an all-failed group is NaN, as wanted
        mean = np.nanmean(returns, axis=1, keepdims=True)
    return returns - mean, np.sum(~np.isnan(returns), axis=1, keepdims=True).astype(np.float64)


def _mean(values: Floats) -> float:
    """The mean over the whole step; summed exactly, so that the order of groups leaves no trace."""
    known = values[~np.isnan(values)]
    return math.fsum(known) / len(known) if len(known) else math.nan


def _over_batch_std(centred: Floats) -> Floats:
    """Centred values over their (std + 1e-4) in the whole step; NaN stays."""
    known = centred[~np.isnan(centred)]
    std = math.sqrt(math.fsum(known**2) / (len(known) - 1)) if len(known) > 1 else 0.0
    return centred / (std + EPS)


def _clean(advantages: Floats, returns: Floats) -> Floats:
    """Exactly 0 where the episode failed or its group has no spread (the mean of equal floats may round)."""
    returns = np.asarray(returns, np.float64)
    low = np.where(np.isnan(returns), np.inf, returns).min(axis=1, keepdims=True)
    high = np.where(np.isnan(returns), -np.inf, returns).max(axis=1, keepdims=True)
    return np.where(np.isnan(returns) | (low >= high), 0.0, advantages)
