"""Sums over sequences in flat streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.harness.algorithms.streams import same_shape, sequence_mean, sequence_sum, suffix_sum

LENGTHS = st.lists(st.integers(1, 6), min_size=0, max_size=6)


@given(LENGTHS, st.integers(0, 9))
def test_against_a_loop(lengths: list[int], seed: int) -> None:
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    parts = list(values.split(lengths))
    for got, want in (
        (sequence_sum(values, sequence), [p.sum().expand(len(p)) for p in parts]),
        (sequence_mean(values, sequence), [p.mean().expand(len(p)) for p in parts]),
        (suffix_sum(values, sequence), [p.flip(0).cumsum(0).flip(0) for p in parts]),
    ):
        torch.testing.assert_close(got, torch.cat([*want, values[:0]]))


def test_what_stands_before_a_sequence_leaves_no_rounding_in_it() -> None:
    values = torch.tensor([1e6, 0.1, 0.2])
    got = suffix_sum(values, torch.tensor([0, 1, 1]))
    assert torch.equal(got[1:], suffix_sum(values[1:], torch.tensor([0, 0])))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"one shape \[M\]"):
        same_shape(torch.zeros(3), torch.zeros(2))
