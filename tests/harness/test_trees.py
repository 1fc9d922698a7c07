"""Rows as a forest: every row is there, in order, once where that pays, within the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Ids
from llm_gym.harness.batching import prefix_tree
from llm_gym.harness.batching.prefix_tree import Forest, common, cut, forest, order
from llm_gym.harness.model.prefix_attention import parts

ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=14)
"""Of three tokens: rows that are equal, begin alike, or go on from another, at any depth."""
TEXTS = ["a", "abc", "abcde", "abcdf", "abcdf", "abx", "b", "ba"]


def rows_of(lists: list[list[int]]) -> list[Ids]:
    made = [np.array(tokens, np.int32) for tokens in lists]
    return [made[i] for i in order(made)]


def grown(rows: list[Ids]) -> Forest:
    return forest([len(row) for row in rows], common(rows))


def packed(prefix_tree: Forest, rows: list[Ids]) -> Ids:
    return np.concatenate([rows[p.row][p.start : p.end] for p in prefix_tree.pieces])


def distinct(rows: list[Ids]) -> int:
    """Different beginnings: the fewest tokens that can hold all rows."""
    return len({row[:n].tobytes() for row in rows for n in range(1, len(row) + 1)})


@pytest.fixture
def share_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "LEAST", 1)
    monkeypatch.setattr(prefix_tree, "BELOW", 0)


@given(ROWS)
def test_every_row_is_there_and_a_piece_follows_what_it_goes_on_from(lists: list[list[int]]) -> None:
    rows = rows_of(lists)
    found = grown(rows)
    row_of_tokens = packed(found, rows)
    for row, places in zip(rows, found.places, strict=True):
        assert np.array_equal(row_of_tokens[places], row)
    for piece in found.pieces:
        above = found.pieces[piece.parent].end if piece.parent >= 0 else 0
        assert piece.start == above < piece.end
    parts([p.end - p.start for p in found.pieces], [p.parent for p in found.pieces])  # depth-first
    assert found.tokens == len(row_of_tokens) <= sum(map(len, rows))


@given(ROWS)
def test_what_is_left_unshared_is_little(lists: list[list[int]]) -> None:
    """Less than the threshold for each place where rows part."""
    rows = rows_of(lists)
    fewest, every = distinct(rows), sum(map(len, rows))
    assert (
        fewest <= grown(rows).tokens <= min(every, fewest + len(rows) * (prefix_tree.LEAST + prefix_tree.BELOW * every))
    )


def test_any_depth_down_to_the_fewest_tokens(share_all: None) -> None:
    rows = rows_of([[ord(c) for c in text] for text in TEXTS])
    assert ["".join(map(chr, row)) for row in rows] == TEXTS
    found = grown(rows)
    texts = ["".join(map(chr, rows[p.row][p.start : p.end])) for p in found.pieces]
    assert texts == ["a", "b", "cd", "e", "f", "x", "b", "a"] or found.tokens == distinct(rows)
    assert found.tokens == distinct(rows) == 9


def test_a_chain_of_a_thousand_rows(share_all: None) -> None:
    """A history that grows: each row goes on from the one before."""
    rows = rows_of([[7] * n for n in range(1, 1001)])
    assert grown(rows).tokens == 1000


def test_sharing_has_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows with 10 tokens in common save 10; 40 tokens below cost 40 times `BELOW`."""
    rows = rows_of([[1] * 10 + [2] * 20, [1] * 10 + [3] * 20])
    for least, below, tokens in ((10, 0, 50), (11, 0, 60), (5, 1 / 8, 50), (5, 1 / 7, 60)):
        monkeypatch.setattr(prefix_tree, "LEAST", least)
        monkeypatch.setattr(prefix_tree, "BELOW", below)
        assert grown(rows).tokens == tokens


def test_what_does_not_pay_for_many_may_pay_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token common to all is left to the two rows that share twenty."""
    monkeypatch.setattr(prefix_tree, "LEAST", 16)
    monkeypatch.setattr(prefix_tree, "BELOW", 0)
    found = grown(rows_of([[1] * 20 + [2], [1] * 20 + [3], [1, 4, 5], [1, 6]]))
    assert [(p.start, p.end, p.parent) for p in found.pieces] == [
        (0, 20, -1),
        (20, 21, 0),
        (20, 21, 0),
        (0, 3, -1),
        (0, 2, -1),
    ]


def test_equal_rows_stand_there_once() -> None:
    found = grown(rows_of([[5] * 30] * 8))
    assert (len(found.pieces), found.tokens) == (1, 30)


def test_nothing_alike_is_a_piece_each() -> None:
    found = forest([4, 3, 3], [0, 0, 0])
    assert [(p.row, p.start, p.end, p.parent) for p in found.pieces] == [(0, 0, 4, -1), (1, 0, 3, -1), (2, 0, 3, -1)]


# The budget


@given(ROWS, st.integers(1, 40))
def test_every_range_keeps_the_budget(lists: list[list[int]], budget: int) -> None:
    rows = rows_of(lists)
    lengths, alike = [len(row) for row in rows], common(rows)
    ranges = cut(lengths, alike, budget)
    assert [i for first, last in ranges for i in range(first, last)] == list(range(len(rows)))
    for first, last in ranges:
        assert last == first + 1 or forest(lengths[first:last], alike[first:last]).tokens <= budget


def test_a_cut_falls_between_groups_if_it_can() -> None:
    """Three groups of four, prompt 50, completions 10; 250 tokens hold two groups (180), and all but a part of a third."""
    alike = [0, 50, 50, 50] * 3
    assert cut([60] * 12, alike, 250) == [(0, 8), (8, 12)]
    assert cut([60] * 12, alike, 90) == [(0, 4), (4, 8), (8, 12)]


def test_a_group_over_the_budget_is_split_and_pays_its_prompt_again() -> None:
    lengths, alike = [60] * 8, [0] + [50] * 7
    ranges = cut(lengths, alike, 80)
    assert ranges == [(0, 3), (3, 6), (6, 8)]
    assert [forest(lengths[a:b], alike[a:b]).tokens for a, b in ranges] == [80, 80, 70]


def test_a_row_over_the_budget_goes_alone() -> None:
    assert cut([100, 30, 30], [0, 0, 0], 60) == [(0, 1), (1, 3)]
