"""`Tokens` as Gymnasium uses it."""

from __future__ import annotations

import json
import pickle
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.errors import SettingError
from llm_gym.spaces import Tokens


class Shift(gymnasium.Env[Any, Any]):
    """Appends the action to the context; over after three steps."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = Tokens(50, 1000), Tokens(50, 8, min_length=1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.context = self.np_random.integers(0, 50, 3, dtype=np.int32)
        self.left = 3
        return self.context, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.context, self.left = np.concatenate([self.context, action]), self.left - 1
        return self.context, float(action.sum()), self.left == 0, False, {}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_members_are_one_dimensional_integers_in_range(dtype: Any) -> None:
    space = Tokens(100, max_length=4, min_length=1)
    assert np.array([0, 99], dtype) in space
    assert np.array([0, 100], dtype) not in space
    assert np.array([], dtype) not in space
    assert np.array([1, 2, 3, 4], dtype) in space
    assert np.array([1, 2, 3, 4, 5], dtype) not in space


@pytest.mark.parametrize(
    "x",
    [
        [1, 2],
        (1, 2),
        None,
        3,
        "12",
        np.int32(3),
        np.array([[1, 2]]),
        np.array(1),
        np.array([1.0, 2.0]),
        np.array([True]),
        np.array([-1, 2]),
        np.array([2**40]),
        np.array(["1"]),
    ],
    ids=repr,
)
def test_everything_else_is_no_member(x: Any) -> None:
    assert x not in Tokens(100, max_length=4)


def test_strided_views_and_empty_sequences_are_members() -> None:
    assert np.arange(10)[::2] in Tokens(9, max_length=5)
    assert np.array([], np.int32) in Tokens(9, max_length=5)
    assert np.array([], np.float64) not in Tokens(9, max_length=5)


@given(st.integers(1, 200_000), st.integers(0, 90), st.integers(0, 90), st.integers(0, 2**32 - 1))
def test_samples_are_members_and_follow_the_seed(vocab: int, least: int, more: int, seed: int) -> None:
    space = Tokens(vocab, least + more, least, seed=seed)
    samples = [space.sample() for _ in range(5)]
    assert all(x in space and x.dtype == np.int32 for x in samples)
    space.seed(seed)
    assert all(np.array_equal(x, space.sample()) for x in samples)
    if more:
        assert all(len(x) < space.max_length for x in samples), "a full-length action reads as a cut completion"


def test_samples_reach_every_length_and_id() -> None:
    space = Tokens(5, max_length=4, min_length=1, seed=0)
    samples = [space.sample() for _ in range(300)]
    assert {len(x) for x in samples} == {1, 2, 3}
    assert set(np.concatenate(samples).tolist()) == set(range(5))


@pytest.mark.parametrize("argument", ["mask", "probability"])
def test_masks_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="mask and probability are not supported"):
        Tokens(5, 4).sample(**{argument: np.ones(5)})


def test_equality_repr_and_pickle() -> None:
    space = Tokens(100, 8, 1, seed=3)
    assert space == Tokens(100, 8, min_length=1)
    assert all(space != other for other in (Tokens(101, 8, 1), Tokens(100, 9, 1), Tokens(100, 8), Discrete(100)))
    assert eval(repr(space)) == space
    assert eval(repr(Tokens(7, 2))) == Tokens(7, 2)
    copy = pickle.loads(pickle.dumps(space))
    assert copy == space
    assert np.array_equal(copy.sample(), space.sample())


def test_json_round_trip() -> None:
    space = Tokens(100, 8, seed=1)
    samples = [space.sample() for _ in range(5)]
    back = space.from_jsonable(json.loads(json.dumps(space.to_jsonable(samples))))
    assert all(np.array_equal(a, b) and b.dtype == np.int32 for a, b in zip(samples, back, strict=True))


@pytest.mark.parametrize(
    ("arguments", "named"), [((0, 4), "vocab_size: got 0"), ((5, 4, 5), "min_length: got 5"), ((5, -1), "min_length")]
)
def test_impossible_spaces_are_refused(arguments: tuple[int, ...], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        Tokens(*arguments)


def test_batches_are_tuples_of_independently_seeded_spaces() -> None:
    batch = batch_space(Tokens(1000, 40, 20, seed=5), 3)
    assert len(batch.spaces) == 3
    a, b, c = batch.sample()
    assert (a, b, c) in batch
    assert not (np.array_equal(a, b) and np.array_equal(b, c))


@pytest.mark.parametrize("kind", [SyncVectorEnv, partial(AsyncVectorEnv, shared_memory=False)], ids=["sync", "async"])
def test_vector_environments_carry_ragged_tokens(kind: Any) -> None:
    envs, alone = kind([Shift] * 3), [Shift() for _ in range(3)]
    try:
        envs.action_space.seed(1)
        seen, _ = envs.reset(seed=[4, 5, 6])
        expected = [env.reset(seed=4 + i)[0] for i, env in enumerate(alone)]
        for _ in range(3):
            assert seen in envs.observation_space
            assert all(np.array_equal(a, b) for a, b in zip(seen, expected, strict=True))
            actions = envs.action_space.sample()
            seen, rewards, over, _, _ = envs.step(actions)
            steps = [env.step(action) for env, action in zip(alone, actions, strict=True)]
            expected = [step[0] for step in steps]
            assert rewards.tolist() == [step[1] for step in steps]
        assert over.all()
        assert len({len(x) for x in seen}) > 1, "the lengths were meant to differ"
    finally:
        envs.close()
