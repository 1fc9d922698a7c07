"""Rows of tokens as a forest: what several rows begin with stands there once.

Sorted, rows that begin alike are neighbours, and the length of the common beginning of neighbours says all about the
tree: a range of rows shares what its neighbours share at least. Walking the ranges from the top gives the pieces in
depth-first order, so that everything that goes on from a piece follows it without a gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llm_gym.core import Ids, common_prefix

Counts = npt.NDArray[np.int64]

LEAST = 4
"""Tokens that a shared piece must save, whatever is below it: what its own calls of the attention kernel cost."""
BELOW = 1 / 32
"""Tokens that it must save besides for each token below it, whose attention then has one more part."""


class Piece(NamedTuple):
    """Consecutive tokens of one or more rows, laid out once."""

    row: int
    """A row that has them."""
    start: int
    """Where in that row they begin: their first position."""
    end: int
    """Where they end."""
    parent: int
    """The piece that stands before them in the row; -1: none."""


@dataclass(frozen=True, slots=True)
class Forest:
    """Pieces in depth-first order."""

    pieces: tuple[Piece, ...]
    places: tuple[Counts, ...]
    """For each row where its tokens stand in the packed row, int64 [length]."""

    @property
    def tokens(self) -> int:
        """Of all pieces."""
        return sum(piece.end - piece.start for piece in self.pieces)


def order(rows: Sequence[Ids]) -> list[int]:
    """The rows' numbers sorted by their tokens, a row before those that go on from it; ties in the order given."""
    return sorted(range(len(rows)), key=lambda i: rows[i].astype(">i4").tobytes())


def common(rows: Sequence[Ids]) -> list[int]:
    """For each row how many tokens it begins with as the row before; 0 for the first."""
    return [0, *(common_prefix(a, b) for a, b in itertools.pairwise(rows))]


def forest(lengths: Sequence[int], alike: Sequence[int]) -> Forest:
    """Pieces of rows that are sorted by `order`; shared where that saves enough.

    From the top, a common beginning becomes a piece if it saves `LEAST` tokens and `BELOW` for each token below it;
    if not, it is left to the pieces that go on from it, which may share it among fewer.

    Args:
        lengths: tokens of each row, all > 0.
        alike: what each has in common with the row before (see `common`); zeros share nothing. The first is not read.
    """
    pieces: list[Piece] = []
    places: list[list[Counts]] = [[] for _ in lengths]
    tokens = 0
    todo = [(first, last, 0, -1) for first, last in reversed(_split(0, len(lengths), 0, alike))]
    while todo:
        first, last, start, parent = todo.pop()
        end = min([lengths[first], *alike[first + 1 : last]])
        parts = _split(first, last, end, alike)
        below = sum(lengths[first:last]) - sum(alike[first + 1 : last]) - end
        if len(parts) == 1 or (end - start) * (len(parts) - 1) >= LEAST + BELOW * below:
            for row in range(first, last):
                places[row].append(np.arange(tokens, tokens + end - start))
            tokens += end - start
            pieces.append(Piece(first, start, end, parent))
            start, parent = end, len(pieces) - 1
        todo += [(a, b, start, parent) for a, b in reversed(parts) if lengths[b - 1] > start]
    return Forest(tuple(pieces), tuple(np.concatenate(parts) for parts in places))


def _split(first: int, last: int, end: int, alike: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges of rows [first, last) that have more than `end` tokens in common, or are equal."""
    cuts = [i for i in range(first + 1, last) if alike[i] <= end]
    return list(zip([first, *cuts], [*cuts, last], strict=True))


def cut(lengths: Sequence[int], alike: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Consecutive ranges of rows whose forests have at most `budget` tokens each; a longer row goes alone.

    A range ends where the least is shared with what follows, in its second half: a prompt is then seldom paid twice.
    """
    ranges, first = [], 0
    while first < len(lengths):
        last, tokens = first + 1, lengths[first]
        while last < len(lengths) and tokens + lengths[last] - alike[last] <= budget:
            tokens += lengths[last] - alike[last]
            last += 1
        if last < len(lengths):
            last = min(range(last, (first + last) // 2, -1), key=lambda i: alike[i])
        while last > first + 1 and forest(lengths[first:last], alike[first:last]).tokens > budget:
            last -= 1
        ranges.append((first, last))
        first = last
    return ranges
