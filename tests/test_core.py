"""Trajectories: turns put together and taken apart, their JSON form, and what they cost."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Completion, Episode, Ids, StopReason, Turn
from llm_gym.episode_files import decode, encode
from llm_gym.trajectories import trajectories


def ids(*tokens: int) -> Ids:
    return np.array(tokens, np.int32)


def turn(prompt: Ids, *sampled: int, reward: float = 0.0) -> Turn:
    return Turn(prompt, Completion(ids(*sampled), -np.arange(1.0, len(sampled) + 1, dtype=np.float32), "stop"), reward)


def episode(*turns: Turn) -> Episode:
    return Episode("e", 0, trajectories(turns), StopReason.ANSWERED)


def same(one: Turn, two: Turn) -> bool:
    arrays = [
        (one.prompt, two.prompt),
        *((getattr(one.completion, n), getattr(two.completion, n)) for n in ("tokens", "logprobs")),
    ]
    rest = [(t.reward, t.completion.finish_reason, t.completion.version, t.completion.updates) for t in (one, two)]
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays) and rest[0] == rest[1]


def test_every_token_has_the_version_that_sampled_it() -> None:
    completion = Completion(ids(5, 6, 7, 8), np.zeros(4, np.float32), "stop", 3, ((1, 4), (3, 5)))
    (again,) = episode(Turn(ids(1, 2), completion)).turns
    assert again.completion.versions.tolist() == [3, 4, 4, 5]
    assert again.completion.versions.dtype == np.int32


def test_turns_that_extend_each_other_are_one_trajectory_of_views() -> None:
    played = episode(turn(ids(1, 2), 7, 8), turn(ids(1, 2, 7, 8, 3), 9, reward=1.0))
    (trajectory,) = played.trajectories
    assert trajectory.tokens.tolist() == [1, 2, 7, 8, 3, 9]
    assert [(s.start, s.stop, s.turn, s.reward) for s in trajectory.spans] == [(2, 4, 0, 0.0), (5, 6, 1, 1.0)]
    assert trajectory.sampled.tolist() == [2, 3, 5]
    assert all(np.shares_memory(t.prompt, trajectory.tokens) for t in played.turns)
    assert (played.reward, played.tokens_generated) == (1.0, 3)


def test_rewritten_history_branches_where_it_departs() -> None:
    """A template that drops thinking from earlier turns: both contexts are trained as they were, none is masked."""
    played = episode(turn(ids(1, 2), 7, 7, 8), turn(ids(1, 2, 8, 3), 9), turn(ids(1, 2, 8, 3, 9, 4), 5, 6))
    first, second = played.trajectories
    assert (first.parent, second.parent) == (None, (0, 2))
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([1, 2, 7, 7, 8], [8, 3, 9, 4, 5, 6])
    assert played.sequence(1).tolist() == [1, 2, 8, 3, 9, 4, 5, 6]
    assert second.of_tokens("turn").tolist() == [1, 2, 2]


@st.composite
def histories(draw: st.DrawFn) -> list[Turn]:
    """Turns whose contexts extend the last one, go back to an earlier one, or begin anew."""
    few = st.lists(st.integers(0, 3), max_size=4)
    turns: list[Turn] = []
    for _ in range(draw(st.integers(0, 6))):
        base = draw(st.sampled_from(turns)) if turns else None
        before = [] if base is None else [*base.prompt, *base.completion.tokens]
        kept = draw(st.sampled_from([len(before), draw(st.integers(0, len(before)))]))
        said = draw(few)
        updates = tuple((i, 5 + i) for i in draw(st.lists(st.integers(0, 3), max_size=2, unique=True).map(sorted)))
        completion = Completion(
            ids(*said),
            np.array(draw(st.lists(st.floats(-9, 0, width=32), min_size=len(said), max_size=len(said))), np.float32),
            draw(st.sampled_from(["stop", "length"])),
            draw(st.integers(0, 9)),
            updates,
        )
        turns.append(Turn(ids(*before[:kept], *draw(few)), completion, draw(st.sampled_from([0.0, 0.5, -1 / 3]))))
    return turns


@given(histories())
def test_turns_come_back_as_they_were_from_trajectories_and_from_json(turns: list[Turn]) -> None:
    played = Episode(
        "e", 3, trajectories(turns), StopReason.TURN_LIMIT, {"a": 1 / 3}, ({"role": "user"},), 2, "no", 0.1, 7
    )
    again = decode(json.loads(json.dumps(encode(played))))
    for back in (played, again):
        assert len(back.turns) == len(turns)
        assert all(same(a, b) for a, b in zip(back.turns, turns, strict=True))
    for name in (
        "env_id",
        "seed",
        "stop_reason",
        "rewards",
        "messages",
        "member",
        "error",
        "seconds",
        "task",
        "reward",
    ):
        assert getattr(again, name) == getattr(played, name)
    assert sum(len(t.tokens) for t in played.trajectories) <= sum(
        len(t.prompt) + len(t.completion.tokens) for t in turns
    )


def test_a_file_of_version_0_1_is_read() -> None:
    record = {
        "env_id": "e", "seed": 4, "member": 1, "task": None, "reward": 1.5, "rewards": {"right": 1.5}, "stop_reason": "answered",
        "error": None, "seconds": 0.5, "messages": [{"role": "user", "content": "?"}],
        "turns": [
            {"prompt": [1, 2], "tokens": [7, 8], "logprobs": [-0.5, -0.25], "finish_reason": "stop", "version": 3, "updates": [[1, 4]], "reward": 0.5},
            {"prompt": [1, 2, 7, 8, 3], "tokens": [9], "logprobs": [-2.0], "finish_reason": "length", "version": 4, "reward": 1.0},
        ],
    }  # fmt: skip
    found = decode(record)
    assert [t.prompt.tolist() for t in found.turns] == [[1, 2], [1, 2, 7, 8, 3]]
    assert found.turns[0].completion.updates == ((1, 4),)
    assert (found.reward, found.turns[1].completion.finish_reason, len(found.trajectories)) == (1.5, "length", 1)


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="got 3, but this version reads 1 and 2"):
        decode(encode(episode(turn(ids(1), 2))) | {"format": 3})


def test_an_episode_costs_at_most_16_bytes_a_token() -> None:
    """32 turns and 17k tokens of a vocabulary of 151k, nearly all of them sampled: in memory, on disk, between processes."""
    rng = np.random.default_rng(0)
    turns, context = [], ids(*rng.integers(0, 151_000, 8))
    for _ in range(32):
        said = rng.integers(0, 151_000, 530).astype(np.int32)
        turns.append(Turn(context, Completion(said, rng.normal(size=530).astype(np.float32), "stop")))
        context = np.concatenate([context, said])
    played = episode(*turns)
    tokens = 8 + 32 * 530
    memory = sum(t.tokens.nbytes + t.logprobs.nbytes for t in played.trajectories)
    assert memory <= 8 * tokens
    assert len(json.dumps(encode(played))) <= 16 * tokens
    assert len(pickle.dumps(played)) <= 16 * tokens
