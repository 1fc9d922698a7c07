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


@given(st.lists(st.integers(0, 4), max_size=4).map(sorted))
def test_an_episode_survives_json(starts: list[int]) -> None:
    episode = played(tuple((start, 4 + i) for i, start in enumerate(starts)))
    again = Episode.from_dict(json.loads(json.dumps(episode.to_dict())))
    assert again.turns[0].completion.updates == episode.turns[0].completion.updates
    for one, two in zip(episode.rows(), again.rows(), strict=True):
        for stream in ("tokens", "trained", "logprobs", "versions", "turns"):
            assert np.array_equal(getattr(one, stream), getattr(two, stream))
