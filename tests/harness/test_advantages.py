"""Advantages: closed forms, and the ways a group may be degenerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.advantages import (
    ADVANTAGES,
    EPS,
    advantage,
    dr_grpo,
    gdpo,
    group_norm,
    none,
    reinforce_pp,
    reinforce_pp_baseline,
    rloo,
    turn_norm,
)
from llm_gym.harness.algorithms.rewards import Rewards

NAN = math.nan
CENTRED = ["group_norm", "dr_grpo", "rloo", "reinforce_pp_baseline", "gdpo", "turn_norm"]
"""Advantages that compare the episodes of one group."""
REWARDS = arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0.0, 0.1, 1.0, -2.0, NAN])
)


def apply(name: str, returns: np.ndarray) -> np.ndarray:
    """The row `name` on episodes of one turn and one reward component, [P, G]."""
    rewards = Rewards(returns, returns[..., None], returns[..., None], ("reward",), np.ones(1))
    got = ADVANTAGES[name](rewards)
    return got[..., 0] if got.ndim == 3 else got


def test_closed_forms() -> None:
    rewards = np.array([[0.0, 1.0, 1.0, 2.0]])
    std = math.sqrt(2 / 3)
    np.testing.assert_allclose(group_norm(rewards), np.array([[-1, 0, 0, 1]]) / (std + EPS), rtol=1e-12)
    np.testing.assert_allclose(dr_grpo(rewards), [[-1, 0, 0, 1]])
    np.testing.assert_allclose(rloo(rewards), [[0 - 4 / 3, 0, 0, 2 - 2 / 3]])
    np.testing.assert_array_equal(none(rewards), rewards)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_failed_episodes_get_zero_and_leave_the_baseline_alone(name: str) -> None:
    with_failures = np.array([[1.0, NAN, 0.0, 3.0, NAN]])
    without = apply(name, np.array([[1.0, 0.0, 3.0]]))
    got = apply(name, with_failures)
    assert got[0, 1] == 0 == got[0, 4]
    np.testing.assert_allclose(got[:, [0, 2, 3]], without, rtol=1e-15)


@pytest.mark.parametrize("name", [*CENTRED, "reinforce_pp"])
@pytest.mark.parametrize("group", [[5.0], [0.1] * 3, [0.1] * 7, [NAN] * 3, [NAN, 2.0, NAN], [NAN, 0.3, 0.3]])
def test_a_group_without_signal_is_exactly_zero(name: str, group: list[float]) -> None:
    assert (apply(name, np.array([group])) == 0).all()


@pytest.mark.parametrize("name", CENTRED)
def test_a_group_without_spread_is_exactly_zero_beside_others(name: str) -> None:
    got = apply(name, np.array([[0.1, 0.1, 0.1], [0.3, 0.7, NAN], [NAN, NAN, 5.0]]))
    assert (got[[0, 2]] == 0).all()
    assert (got[1] != 0).tolist() == [True, True, False]


@given(REWARDS, st.sampled_from(sorted(ADVANTAGES)), st.randoms(use_true_random=False))
def test_advantages_move_with_their_group(rewards: np.ndarray, name: str, random: object) -> None:
    got = apply(name, rewards)
    assert got.shape == rewards.shape
    assert np.isfinite(got).all()
    order = np.random.default_rng(len(rewards)).permutation(len(rewards))
    np.testing.assert_array_equal(apply(name, rewards[order]), got[order])


@given(REWARDS, st.sampled_from(CENTRED))
def test_centred_advantages_sum_to_zero(rewards: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(apply(name, rewards).sum(axis=1), 0, atol=1e-9)


def test_reinforce_pp_closed_forms() -> None:
    """Mean 1 and sample variance 10/5 over the six sound episodes; deviations of sizes 1, 1, 2, 2 with baseline."""
    returns = np.array([[0.0, 2.0, NAN, 2.0], [3.0, -1.0, 0.0, NAN]])
    np.testing.assert_allclose(
        reinforce_pp(returns), np.array([[-1, 1, 0, 1], [2, -2, -1, 0]]) / (math.sqrt(12 / 5) + EPS), rtol=1e-12
    )
    centred = np.array([[-4, 2, 0, 2], [7, -5, -2, 0]]) / 3
    std = math.sqrt((centred**2).sum() / 5)
    np.testing.assert_allclose(reinforce_pp_baseline(returns), centred / (std + EPS), rtol=1e-12)


def test_a_group_without_spread_has_a_signal_under_reinforce_pp() -> None:
    got = reinforce_pp(np.array([[1.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(got, np.array([[1, 1], [-1, -1]]) * 0.5 / (math.sqrt(1 / 3) + EPS))


def test_gdpo_closed_form() -> None:
    """Components (1, 0) and (0, 1) sum to the same return; GRPO calls them equal, GDPO weighs their rarity."""
    components = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [NAN, NAN]]])
    low, high = -1 / 3 / (math.sqrt(1 / 3) + EPS), 2 / 3 / (math.sqrt(1 / 3) + EPS)
    total = np.array([high + 2 * -high, low - 2 * low, low - 2 * low])
    total /= math.sqrt((total**2).sum() / 2) + EPS
    np.testing.assert_allclose(gdpo(components, np.array([1.0, 2.0])), [[*total, 0]], rtol=1e-12)
    assert (group_norm(components.sum(-1)) == 0).all()


def test_gdpo_does_not_let_a_wide_component_drown_a_narrow_one() -> None:
    narrow = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]])
    wide = 1000 * np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]])
    got = gdpo(np.stack([narrow, wide], axis=-1), np.ones(2))
    scaled = gdpo(np.stack([narrow, wide / 1000], axis=-1), np.ones(2))
    np.testing.assert_allclose(got, scaled, atol=1e-3)
    np.testing.assert_allclose(got[0, [0, 3]], 0, atol=1e-3)  # one component each: worth the same
    assert (gdpo(np.empty((2, 3, 0)), np.empty(0)) == 0).all()


def test_turn_norm_closed_form() -> None:
    """Rewards to go (3, 2), (1, 1), (0): the first turns are compared with three, the second with two."""
    turns = np.array([[[1.0, 2.0], [0.0, 1.0], [0.0, NAN], [NAN, NAN]]])
    first = group_norm(np.array([[3.0, 1.0, 0.0, NAN]]))[0]
    second = group_norm(np.array([[2.0, 1.0, NAN, NAN]]))[0]
    np.testing.assert_allclose(turn_norm(turns), [np.stack([first, second], axis=-1)], rtol=1e-12)
    assert turn_norm(turns)[0, 2].tolist()[1] == 0
    assert turn_norm(np.empty((2, 3, 0))).shape == (2, 3, 0)


def test_a_reward_in_the_first_turn_is_no_credit_of_the_second() -> None:
    turns = np.array([[[1.0, 0.5], [0.0, 0.5], [0.3, 0.5]]])
    got = turn_norm(turns)
    assert (got[..., 1] == 0).all()
    assert got[0, 0, 0] > 0 > got[0, 1, 0]


def test_by_name() -> None:
    returns = np.array([[1.0, 0.0, 3.0]])
    np.testing.assert_array_equal(apply("rloo", returns), rloo(returns))
    rewards = Rewards(returns, returns[..., None], returns[..., None], ("reward",), np.ones(1))
    np.testing.assert_array_equal(advantage("test_advantages:ranks")(rewards), ranks(rewards))
    with pytest.raises(ConfigError, match=r"advantage: unknown value 'grup_norm'; did you mean 'group_norm'\?"):
        advantage("grup_norm")
    with pytest.raises(ConfigError, match="cannot import 'no_such_module' of 'no_such_module:fn'"):
        advantage("no_such_module:fn")


def test_rewards_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"want \[P, G\]"):
        group_norm(np.zeros(3))
    with pytest.raises(ValueError, match="finite or NaN"):
        group_norm(np.array([[math.inf, 0.0]]))


def ranks(rewards: Rewards) -> np.ndarray:
    """A user's own: best and worst only."""
    return np.sign(rewards.returns - np.nanmedian(rewards.returns, axis=1, keepdims=True))
