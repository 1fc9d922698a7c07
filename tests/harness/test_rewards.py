"""Rewards as arrays: what failed is NaN, parts add up, and long completions pay."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.harness.algorithms.rewards import overlong_penalty, rewards_of
from llm_gym.trajectories import trajectories


def episode(*turns: tuple[int, float], reason: StopReason = StopReason.ANSWERED, **rewards: float) -> Episode:
    """Turns of (tokens, reward)."""
    made = tuple(
        Turn(np.zeros(2, np.int32), Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), "stop"), reward)
        for n, reward in turns
    )
    return Episode("e", 0, trajectories(made), reason, rewards)


GROUPS = [
    Group(Task(0, 0), (episode((3, 0.5), (2, 1.0), right=1.0, style=0.25), episode((8, 0.0), right=0.0))),
    Group(Task(0, 1), (episode((1, 9.0), reason=StopReason.ENV_ERROR, right=9.0), episode((10, 2.0), style=1.0))),
]


def test_the_arrays() -> None:
    got = rewards_of(GROUPS, weights={"style": 2.0})
    nan = math.nan
    np.testing.assert_array_equal(got.returns, [[1.5, 0], [nan, 2]])
    np.testing.assert_array_equal(got.returns, np.stack([g.rewards for g in GROUPS]))
    np.testing.assert_array_equal(got.turns, [[[0.5, 1], [0, nan]], [[nan, nan], [2, nan]]])
    assert got.names == ("right", "style")
    np.testing.assert_array_equal(got.components, [[[1, 0.25], [0, 0]], [[nan, nan], [0, 1]]])
    np.testing.assert_array_equal(got.weights, [[1, 2], [1, 2]])
    np.testing.assert_array_equal(np.einsum("pgc,pc->pg", got.components, got.weights), got.returns)


def test_overlong_closed_form() -> None:
    """DAPO's numbers: nothing to 16384 tokens, half at 18432, -1 at 20480."""
    lengths = np.array([1, 16384, 18432, 20480])
    np.testing.assert_allclose(overlong_penalty(lengths, 20480, 0.2), [0, 0, -0.5, -1])


def test_long_completions_pay_in_their_turn() -> None:
    got = rewards_of(GROUPS, limit=10, overlong=0.5)
    np.testing.assert_allclose(got.turns[0], [[0.5, 1], [-0.6, math.nan]])
    np.testing.assert_allclose(got.returns, [[1.5, -0.6], [math.nan, 1.0]])
    assert got.names[-1] == "overlong"
    np.testing.assert_allclose(got.components[..., -1], [[0, -0.6], [math.nan, -1]])
    np.testing.assert_allclose(np.nansum(got.turns, axis=-1)[0], got.returns[0])


@pytest.mark.parametrize("overlong", [0.0, 0.5])
def test_a_step_without_a_turn_is_empty_not_an_error(overlong: float) -> None:
    got = rewards_of([Group(Task(0, 0), (episode(reason=StopReason.POLICY_ERROR),))], limit=10, overlong=overlong)
    assert got.turns.shape == (1, 1, 0)
    assert np.isnan(got.returns).all()
