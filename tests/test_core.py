"""The ledger: per-token versions, rows, and the JSON form."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Completion, Episode, Ids, StopReason, Turn


def ids(*tokens: int) -> Ids:
    return np.array(tokens, np.int32)


def played(updates: tuple[tuple[int, int], ...]) -> Episode:
    completion = Completion(ids(5, 6, 7, 8), np.array([-0.1, -0.2, -1 / 3, -4], np.float32), "stop", 3, updates)
    return Episode("e", 0, (Turn(ids(1, 2), completion, 1.0),), StopReason.ANSWERED)


def test_every_token_has_the_version_that_sampled_it() -> None:
    (row,) = played(((1, 4), (3, 5))).rows()
    assert row.versions.tolist() == [-1, -1, 3, 4, 4, 5]
    assert row.versions.dtype == np.int32


def test_rewritten_history_opens_a_new_row() -> None:
    """A template that drops thinking from earlier turns: both contexts are trained as they were, none is masked."""

    def turn(prompt: Ids, *sampled: int) -> Turn:
        return Turn(prompt, Completion(ids(*sampled), np.zeros(len(sampled), np.float32), "stop"), 0.0)

    thought = turn(ids(1, 2), 7, 7, 8)
    rewritten = turn(ids(1, 2, 8, 3), 9)
    extended = turn(ids(1, 2, 8, 3, 9, 4), 5, 6)
    first, second = Episode("e", 0, (thought, rewritten, extended), StopReason.ANSWERED).rows()
    assert first.tokens.tolist() == [1, 2, 7, 7, 8]
    assert second.tokens.tolist() == [1, 2, 8, 3, 9, 4, 5, 6]
    assert first.turns.tolist() == [-1, -1, 0, 0, 0]
    assert second.turns.tolist() == [-1, -1, -1, -1, 1, -1, 2, 2]
    assert [row.trained.sum() for row in (first, second)] == [3, 3]


@given(st.lists(st.integers(0, 4), max_size=4).map(sorted))
def test_an_episode_survives_json(starts: list[int]) -> None:
    episode = played(tuple((start, 4 + i) for i, start in enumerate(starts)))
    again = Episode.from_dict(json.loads(json.dumps(episode.to_dict())))
    assert again.turns[0].completion.updates == episode.turns[0].completion.updates
    for one, two in zip(episode.rows(), again.rows(), strict=True):
        for stream in ("tokens", "trained", "logprobs", "versions", "turns"):
            assert np.array_equal(getattr(one, stream), getattr(two, stream))
