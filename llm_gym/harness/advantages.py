"""Advantages: from the returns of a step's groups to one credit per episode.

Every function maps rewards [P, G] float64 (P tasks, G episodes each) to advantages [P, G] float64.
NaN marks an episode that failed for no fault of the policy: it is left out of every mean and
deviation, and its advantage is exactly 0. A group that carries no signal (one episode left, no
spread, all failed) gets exactly 0, never NaN or an amplified rounding error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llm_gym.harness.named import by_name

Rewards = npt.NDArray[np.float64]
AdvantageFn = Callable[[Rewards], Rewards]

EPS = 1e-4
"""Added to the standard deviation (as TRL and verl do up to a factor), so that tiny spreads stay tiny."""


def group_norm(rewards: Rewards) -> Rewards:
    """(r - mean) / (std + 1e-4) within each group; std is the sample deviation (n - 1).

    GRPO, eq. 3.1.1 of https://arxiv.org/abs/2402.03300.
    """
    centred, count = _centred(rewards)
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.sqrt(np.nansum(centred**2, axis=1, keepdims=True) / (count - 1))
    return _clean(centred / (std + EPS), rewards)


def dr_grpo(rewards: Rewards) -> Rewards:
    """r - mean within each group: no division by the spread, which favours too easy and too hard tasks.

    Dr. GRPO, section 3.2 of https://arxiv.org/abs/2503.20783.
    """
    return _clean(_centred(rewards)[0], rewards)


def rloo(rewards: Rewards) -> Rewards:
    """r - mean of the OTHER episodes of the group, an unbiased baseline; equals n/(n-1) * (r - mean).

    RLOO, https://arxiv.org/abs/2402.14740.
    """
    centred, count = _centred(rewards)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _clean(centred * (count / (count - 1)), rewards)


def none(rewards: Rewards) -> Rewards:
    """The return itself, no baseline: plain REINFORCE."""
    rewards = _checked(rewards)
    return np.where(np.isnan(rewards), 0.0, rewards)


ADVANTAGES: dict[str, AdvantageFn] = {"group_norm": group_norm, "dr_grpo": dr_grpo, "rloo": rloo, "none": none}


def advantage(name: str) -> AdvantageFn:
    """The function of that name in `ADVANTAGES`, or the one at `package.module:function`.

    Raises:
        ConfigError: neither.
    """
    fn: AdvantageFn = by_name("advantage", name, ADVANTAGES)
    return fn


def _checked(rewards: Rewards) -> Rewards:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or np.isinf(rewards).any():
        raise ValueError(f"rewards: want [P, G], finite or NaN, got shape {rewards.shape}.")
    return rewards


def _centred(rewards: Rewards) -> tuple[Rewards, Rewards]:
    """Deviations from the group mean [P, G] (NaN where failed) and the episodes counted [P, 1]."""
    rewards = _checked(rewards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of an all-failed group is NaN, as wanted
        mean = np.nanmean(rewards, axis=1, keepdims=True)
    return rewards - mean, np.sum(~np.isnan(rewards), axis=1, keepdims=True).astype(np.float64)


def _clean(advantages: Rewards, rewards: Rewards) -> Rewards:
    """Exactly 0 where the episode failed or its group has no spread (the mean of equal floats may round)."""
    rewards = np.asarray(rewards, np.float64)
    low = np.where(np.isnan(rewards), np.inf, rewards).min(axis=1, keepdims=True)
    high = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1, keepdims=True)
    return np.where(np.isnan(rewards) | (low >= high), 0.0, advantages)
