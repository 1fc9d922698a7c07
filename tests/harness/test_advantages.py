"""Advantages: closed forms, and the ways a group may be degenerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_gym.errors import ConfigError
from llm_gym.harness.advantages import ADVANTAGES, EPS, advantage, dr_grpo, group_norm, none, rloo

NAN = math.nan
REWARDS = arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0.0, 0.1, 1.0, -2.0, NAN])
)


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
    without = ADVANTAGES[name](np.array([[1.0, 0.0, 3.0]]))
    got = ADVANTAGES[name](with_failures)
    assert got[0, 1] == 0 == got[0, 4]
    np.testing.assert_array_equal(got[:, [0, 2, 3]], without)


@pytest.mark.parametrize("name", ["group_norm", "dr_grpo", "rloo"])
@pytest.mark.parametrize("group", [[5.0], [0.1] * 3, [0.1] * 7, [NAN] * 3, [NAN, 2.0, NAN], [NAN, 0.3, 0.3]])
def test_a_group_without_signal_is_exactly_zero(name: str, group: list[float]) -> None:
    got = ADVANTAGES[name](np.array([group]))
    assert (got == 0).all()


@given(REWARDS, st.sampled_from(sorted(ADVANTAGES)), st.randoms(use_true_random=False))
def test_advantages_move_with_their_group(rewards: np.ndarray, name: str, random: object) -> None:
    fn = ADVANTAGES[name]
    got = fn(rewards)
    assert got.shape == rewards.shape
    assert np.isfinite(got).all()
    order = np.random.default_rng(len(rewards)).permutation(len(rewards))
    np.testing.assert_array_equal(fn(rewards[order]), got[order])


@given(REWARDS, st.sampled_from(["group_norm", "dr_grpo", "rloo"]))
def test_centred_advantages_sum_to_zero(rewards: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(ADVANTAGES[name](rewards).sum(axis=1), 0, atol=1e-9)


def test_by_name() -> None:
    assert advantage("rloo") is rloo
    assert advantage("llm_gym.harness.advantages:dr_grpo") is dr_grpo
    with pytest.raises(ConfigError, match=r"advantage: unknown value 'grup_norm'; did you mean 'group_norm'\?"):
        advantage("grup_norm")
    with pytest.raises(ConfigError, match="cannot import 'no_such_module:fn'"):
        advantage("no_such_module:fn")


def test_rewards_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"want \[P, G\]"):
        group_norm(np.zeros(3))
    with pytest.raises(ValueError, match="finite or NaN"):
        group_norm(np.array([[math.inf, 0.0]]))
