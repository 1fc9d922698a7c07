"""Packing: what a micro-batch holds, and denominators that no split can change."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import credit_of, row, sample

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Trajectory, Turn
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.normalisers import NORMALISERS
from llm_gym.harness.batching.packing import pack, samples
from llm_gym.harness.types import Batch, TrainSequence
from llm_gym.trajectories import trajectories

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=12)


def tokens_of(batch: Batch) -> list[tuple[int, ...]]:
    """(advantage, target, old log-probability, weight, predicting id, position) of every trained token, sorted."""
    every = []
    for m in batch.micro:
        columns = (
            m.streams["advantages"],
            m.streams["target"],
            m.streams["old_logprobs"],
            m.streams["weight"],
            m.tokens[m.streams["source"]],
            m.positions[m.streams["source"]],
        )
        every += list(zip(*(c.tolist() for c in columns), strict=True))
    return sorted(every)


def numbered(lengths: list[int]) -> list[TrainSequence]:
    return [sample(row(n, i), i + 1.0, i) for i, n in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 60))
def test_every_trained_token_is_there_once_with_its_predecessor(lengths: list[int], budget: int) -> None:
    made = numbered(lengths)
    want = []
    total = sum(len(s.trained) for s in made)
    for s in made:
        for i, old in zip(s.trained, s.streams["old_logprobs"].tolist(), strict=True):
            weight = float(np.float32(1 / total))
            want.append((credit_of(s), int(s.tokens[i]), old, weight, int(s.tokens[i - 1]), i - 1))
    assert tokens_of(pack(made, max_tokens=budget)) == sorted(want)


@given(LENGTHS, st.integers(1, 60))
def test_micro_batches_keep_the_budget_and_their_own_books(lengths: list[int], budget: int) -> None:
    for m in pack(numbered(lengths), max_tokens=budget).micro:
        assert len(m.tokens) == len(m.positions) == sum(m.lengths)
        assert len(m.tokens) <= budget or len(m.lengths) == 1
        assert list(m.lengths) == sorted(m.lengths, reverse=True)
        starts = np.concatenate([[0], np.cumsum(m.lengths)[:-1]])
        torch.testing.assert_close(
            m.streams["source"] - torch.from_numpy(starts)[m.streams["sequence"]], m.positions[m.streams["source"]]
        )


@given(LENGTHS, st.sampled_from(sorted(NORMALISERS)), st.randoms(use_true_random=False))
def test_weights_do_not_depend_on_budget_or_order(lengths: list[int], normaliser: str, random: object) -> None:
    made = numbered(lengths)
    shuffled = [made[i] for i in np.random.default_rng(len(made)).permutation(len(made))]
    whole = pack(made, max_tokens=10**6, normaliser=normaliser)
    split = pack(shuffled, max_tokens=17, normaliser=normaliser)
    assert tokens_of(whole) == tokens_of(split)
    assert (whole.tokens, whole.episodes) == (split.tokens, split.episodes)


def weights(batch: Batch) -> dict[int, list[float]]:
    """Token weights by advantage (our label of the episode)."""
    found: dict[int, list[float]] = {}
    for m in batch.micro:
        for a, w in zip(m.streams["advantages"].tolist(), m.streams["weight"].tolist(), strict=True):
            found.setdefault(int(a), []).append(w)
    return found


@pytest.mark.parametrize(
    ("normaliser", "short", "long"),
    [
        ("token_global", Fraction(1, 1010), Fraction(1, 1010)),
        ("sequence", Fraction(1, 20), Fraction(1, 2000)),
        ("constant", Fraction(1, 512), Fraction(1, 512)),
    ],
)
def test_ten_against_a_thousand_tokens(normaliser: str, short: Fraction, long: Fraction) -> None:
    made = [sample(row(13, 0, prompt=3), 1.0, 0), sample(row(1003, 1, prompt=3), 2.0, 1)]
    for budget in (10**6, 100):
        got = weights(pack(made, max_tokens=budget, normaliser=normaliser, constant_length=256))
        assert got[1] == pytest.approx([float(short)] * 10, rel=1e-6)
        assert got[2] == pytest.approx([float(long)] * 1000, rel=1e-6)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_an_episode_of_three_rows_counts_once(normaliser: str) -> None:
    """The same 12 trained tokens as one row or as three: same totals, same weight per token."""
    whole = [sample(row(15, 0, prompt=3), 1.0, 0), sample(row(9, 1, prompt=3), 2.0, 1)]
    parts = [sample(row(7, i, prompt=3), 1.0, 0) for i in range(3)] + [whole[1]]
    one, three = (pack(x, max_tokens=50, normaliser=normaliser) for x in (whole, parts))
    assert weights(one) == weights(three)
    assert (one.tokens, one.episodes) == (three.tokens, three.episodes) == (18, 2)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_sequences_of_zero_advantage_are_counted_but_not_computed(normaliser: str) -> None:
    made = numbered([5, 9, 12])
    made[1] = sample(made[1], 0.0, 1)
    every, fewer = (pack(made, max_tokens=100, normaliser=normaliser, skip_zero=s) for s in (False, True))
    assert weights(fewer) == {a: w for a, w in weights(every).items() if a}
    assert (every.tokens, every.episodes) == (fewer.tokens, fewer.episodes)
    assert sum(len(m.tokens) for m in fewer.micro) < sum(len(m.tokens) for m in every.micro)


def test_a_batch_without_signal_is_empty() -> None:
    batch = pack([sample(row(9, 0), 0.0, 0)], max_tokens=10, skip_zero=True)
    assert batch == Batch((), tokens=5, episodes=1)
    assert pack([], max_tokens=10) == Batch((), tokens=0, episodes=0)


def test_nothing_behind_the_last_trained_token_is_computed() -> None:
    base = row(10, 0, prompt=4)
    known = {"old_logprobs": base.streams["old_logprobs"][:3]}
    cut = TrainSequence(base.tokens, base.trained[:3], known)
    (micro,) = pack([sample(cut, 1.0, 0)], max_tokens=100).micro
    assert micro.tokens.tolist() == base.tokens[:6].tolist()
    assert micro.streams["target"].tolist() == base.tokens[4:7].tolist()


def test_per_token_advantages() -> None:
    base = row(8, 0, prompt=5)
    (micro,) = pack([sample(base, np.arange(8.0), 0)], max_tokens=100).micro
    assert micro.streams["advantages"].tolist() == [5, 6, 7]


def test_the_layout_is_deterministic_and_ties_keep_their_order() -> None:
    made = [sample(row(9, i), float(i), i) for i in range(5)]
    (micro,) = pack(made, max_tokens=1000).micro
    assert micro.streams["advantages"].tolist() == sorted(micro.streams["advantages"].tolist())


def test_a_trained_first_token_is_refused() -> None:
    with pytest.raises(ValueError, match="first token"):
        pack([sample(row(4, 0, prompt=0), 1.0, 3)], max_tokens=10)


def test_an_unknown_normaliser_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sequence'"):
        pack(numbered([4]), max_tokens=10, normaliser="sequences")


def test_moving_keeps_every_field() -> None:
    (micro,) = pack(numbered([4, 6]), max_tokens=100).micro
    moved = micro.to("cpu")
    assert (moved.lengths, moved.parents) == (micro.lengths, micro.parents)
    assert torch.equal(moved.tokens, micro.tokens)
    assert torch.equal(moved.positions, micro.positions)
    assert list(moved.streams) == list(micro.streams)
    assert all(torch.equal(moved.streams[name], stream) for name, stream in micro.streams.items())


def test_a_stream_is_named_in_the_table_and_as_long_as_the_others() -> None:
    (micro,) = pack(numbered([4, 6]), max_tokens=100).micro
    with pytest.raises(ValueError, match="streams: got 'teachers', want names of"):
        micro.having(teachers=micro.streams["weight"])
    with pytest.raises(ValueError, match="streams: want one length for all, got"):
        micro.having(teacher=torch.zeros(1))


# From episodes

PROMPT = np.arange(4, dtype=np.int32)


def episode(member: int, reason: StopReason, *, tool: tuple[int, ...] = (50, 51)) -> Episode:
    """Two turns with a tool's answer between them; token ids tell what is what."""
    first = Completion(np.array([10, 11, member], np.int32), np.full(3, -1.0, np.float32), "stop")
    second = Completion(np.array([20, 21], np.int32), np.full(2, -2.0, np.float32), "stop")
    context = np.concatenate([PROMPT, first.tokens, np.array(tool, np.int32)])
    turns = (Turn(PROMPT, first, 0.0), Turn(context, second, float(member)))
    return Episode("e", 7, trajectories(turns), reason, member=member)


def group_of(*reasons: StopReason) -> Group:
    return Group(Task(0, 7), tuple(episode(i, reason) for i, reason in enumerate(reasons)))


def test_failed_episodes_leave_no_token_and_shift_nobody() -> None:
    groups = [
        group_of(StopReason.ANSWERED, StopReason.ENV_ERROR, StopReason.ANSWERED),
        group_of(StopReason.POLICY_ERROR, StopReason.ANSWERED, StopReason.CANCELLED),
    ]
    advantages = np.array([[1.0, 9.0, 2.0], [9.0, 3.0, 9.0]])
    made = samples(groups, advantages)
    assert [(credit_of(s), s.tokens[6]) for s in made] == [(1.0, 0), (2.0, 2), (3.0, 1)]
    assert pack(made, max_tokens=100).tokens == 15
    assert pack(made, max_tokens=100).episodes == 3


def test_a_cut_episode_is_trained_unless_masked() -> None:
    groups = [group_of(StopReason.ANSWERED, StopReason.TOKEN_LIMIT, StopReason.TURN_LIMIT)]
    advantages = np.array([[1.0, 2.0, 3.0]])
    assert [credit_of(s) for s in samples(groups, advantages)] == [1.0, 2.0, 3.0]
    assert [credit_of(s) for s in samples(groups, advantages, train_truncated=False)] == [1.0, 3.0]


def test_credit_by_turn_reaches_the_tokens_of_that_turn() -> None:
    groups = [group_of(StopReason.ANSWERED, StopReason.ENV_ERROR), group_of(StopReason.ANSWERED, StopReason.ANSWERED)]
    credit = np.array([[[1.0, -2.0], [9.0, 9.0]], [[0.0, 0.0], [3.0, 0.0]]])
    made = samples(groups, credit)
    batch = pack(made, max_tokens=100, skip_zero=True)
    assert [m.streams["advantages"].tolist() for m in batch.micro] == [[1, 1, 1, -2, -2, 3, 3, 3, 0, 0]]
    assert (batch.tokens, batch.episodes) == (15, 3)
    rewritten = Turn(np.arange(30, 34, dtype=np.int32), groups[0].episodes[0].turns[1].completion, 0.0)
    apart = Episode("e", 7, trajectories([groups[0].episodes[0].turns[0], rewritten]), StopReason.ANSWERED)
    first, second = samples([Group(Task(0, 7), (apart,))], np.array([[[1.0, -2.0]]]))
    assert credit_of(first) == 1
    assert credit_of(second) == -2


def test_a_trajectory_without_a_completion_is_no_sequence() -> None:
    shown = Trajectory(PROMPT, (), {"logprobs": np.empty(0, np.float32)})
    one = episode(0, StopReason.ANSWERED)
    both = dataclasses.replace(one, trajectories=(*one.trajectories, shown))
    assert len(samples([Group(Task(0, 7), (both,))], np.array([[[1.0, 2.0]]]))) == 1


def test_tool_tokens_are_never_targets() -> None:
    """Changing a tool's answer changes contexts, but the trained tokens stay the same five."""
    for tool in ((50, 51), (52, 53, 54)):
        group = Group(Task(0, 7), (episode(0, StopReason.ANSWERED, tool=tool),))
        (micro,) = pack(samples([group], np.array([[1.0]])), max_tokens=100).micro
        assert micro.streams["target"].tolist() == [10, 11, 0, 20, 21]
        assert micro.tokens[micro.streams["source"]].tolist() == [3, 10, 11, tool[-1], 20]
        assert micro.streams["old_logprobs"].tolist() == [-1, -1, -1, -2, -2]
