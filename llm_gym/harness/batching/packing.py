"""Training rows to packed micro-batches, with every denominator fixed beforehand.

A micro-batch is one flat row of tokens: sequences laid end to end, no padding; what several of them begin with
may stand there once (see `trees`). The layout is deterministic (sorted by length, or by tokens where beginnings are
shared; ties in the order given), so a run can be repeated bit for bit.

The loss of a step is `sum(weight * per-token loss)` over all its micro-batches. The weights come from
a normaliser that sees the WHOLE step before the first micro-batch is made; hence the gradient is the
same however the rows were split, ordered or spread over ranks. A sequence whose gradient is known to be
zero (advantage 0, no KL or entropy term) is counted there but never computed, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_gym.core import Group, Ids, Row, StopReason
from llm_gym.harness.algorithms.normalisers import normaliser_of
from llm_gym.harness.batching.prefix_tree import Forest, common, cut, forest, order

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row and the credit it carries."""

    row: Row
    advantage: float | Floats
    """One value for the row, or one per token [n] (read where the token is trained)."""
    episode: int
    """Which episode it belongs to; the rows of one episode share that episode's weight."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row: N input tokens of S sequences, M trained tokens."""

    tokens: Tensor
    """Input ids, int64 [N]; a sequence ends before its last trained token, which is only a target."""
    positions: Tensor
    """Position ids, int64 [N], from 0 in every sequence."""
    lengths: tuple[int, ...]
    """Input tokens of each piece; they sum to N. A piece is a sequence, or what several sequences begin with, or
    what follows that."""
    source: Tensor
    """Index into N of the hidden state that predicts each trained token, int64 [M]."""
    target: Tensor
    """Ids of the trained tokens, int64 [M]."""
    old_logprobs: Tensor
    """The sampler's log-probabilities, float32 [M]."""
    advantages: Tensor
    """float32 [M]."""
    weight: Tensor
    """Weight of each token's loss, float32 [M]."""
    sequence: Tensor
    """Index into S of each trained token's sequence, int64 [M]."""
    parents: tuple[int, ...] = ()
    """The piece that each piece goes on from, or -1. Depth-first: all that goes on from a piece, directly or not,
    follows it without a gap. Empty: no piece has a parent."""
    proximal: Tensor | None = None
    """The learner's log-probabilities before the first of several updates, [M] (see `corrections`); None: those of
    the model as it is."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name in self.__slots__ if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything of one optimizer step."""

    micro: tuple[MicroBatch, ...]
    tokens: int
    """Trained tokens, those of sequences not computed included: the denominator of token means."""
    episodes: int
    """Episodes with at least one trained token."""


class Weighted(NamedTuple):
    """A sample that is to be laid out."""

    sample: Sample
    weight: float
    """Of each of its trained tokens."""
    tokens: Ids
    """Input tokens that matter: what follows the last trained token, and that token itself, predict nothing."""


def samples(groups: Iterable[Group], advantages: Floats, *, train_truncated: bool = True) -> list[Sample]:
    """The rows that a step trains on.

    A failed episode gives none (it carries no token into any denominator either). With
    `train_truncated=False` neither does an episode that was cut by a limit (DAPO's overlong filtering):
    it keeps its place in its group's baseline, and is left out of the loss.

    Args:
        groups: P groups of G episodes.
        advantages: [P, G], or [P, G, T]: one for each turn.
        train_truncated: whether episodes cut by length or time are trained on.
    """
    chosen = []
    cut = (StopReason.TOKEN_LIMIT, StopReason.TIME_LIMIT)
    number = 0
    for group, credits in zip(groups, advantages, strict=True):
        for episode, credit in zip(group.episodes, credits, strict=True):
            number += 1
            if episode.stop_reason.failed or (not train_truncated and episode.stop_reason in cut):
                continue
            chosen += [Sample(row, _credit(credit, row), number - 1) for row in episode.rows()]
    return chosen


def _credit(credit: Floats, row: Row) -> float | Floats:
    """The episode's one advantage, or that of each token's turn."""
    return np.where(row.trained, credit[row.turns], 0.0) if np.ndim(credit) else float(credit)


def pack(
    rows: Sequence[Sample],
    *,
    max_tokens: int,
    normaliser: str = "token_global",
    constant_length: int = 256,
    skip_zero: bool = False,
    share: bool = False,
) -> Batch:
    """Lays rows into micro-batches of at most `max_tokens` input tokens (a longer row goes alone).

    Args:
        rows: the step's samples; those without a trained token are dropped.
        max_tokens: token budget of a micro-batch.
        normaliser: a name in `NORMALISERS`, or `package.module:function`.
        constant_length: see `constant`.
        skip_zero: leave out sequences whose advantages are all 0. Exact if no other loss term is on.
        share: lay out once what several rows of a micro-batch begin with (a group's prompt, the turns before a
            history was rewritten, a system prompt) where that saves enough. The gradient is the same; the model
            must read `parents` (`Body.shares`).

    Raises:
        ValueError: a row whose first token is trained (nothing predicts it).
        ConfigError: an unknown normaliser.
    """
    kept = [s for s in rows if s.row.trained.any()]
    for s in kept:
        if s.row.trained[0]:
            raise ValueError(f"rows: the first token of a row of episode {s.episode} is trained; nothing predicts it.")
    numbers, of_row = np.unique([s.episode for s in kept], return_inverse=True)
    per_row = np.array([s.row.trained.sum() for s in kept], np.int64)
    counts = np.bincount(of_row, weights=per_row, minlength=len(numbers)).astype(np.int64)
    weights = normaliser_of(normaliser)(counts, constant_length)
    live = [
        Weighted(s, float(weights[number]), s.row.tokens[: np.flatnonzero(s.row.trained)[-1]])
        for s, number in zip(kept, of_row, strict=True)
        if not skip_zero or np.any(_credits(s) != 0)
    ]
    live.sort(key=lambda row: -len(row.tokens))  # stable: neighbours of like length need little attention padding
    return Batch(tuple(_micro_batches(live, max_tokens, share)), int(counts.sum()), len(numbers))


def _micro_batches(rows: Sequence[Weighted], budget: int, share: bool) -> Iterator[MicroBatch]:
    if share:
        rows = [rows[i] for i in order([row.tokens for row in rows])]
    lengths = [len(row.tokens) for row in rows]
    alike = common([row.tokens for row in rows]) if share else [0] * len(rows)
    for first, last in cut(lengths, alike, budget):
        yield _micro(rows[first:last], forest(lengths[first:last], alike[first:last]))


def _credits(sample: Sample) -> Floats:
    """The advantage of each trained token."""
    credits = np.broadcast_to(np.asarray(sample.advantage, np.float64), sample.row.tokens.shape)
    return credits[sample.row.trained]


def _micro(rows: Sequence[Weighted], trees: Forest) -> MicroBatch:
    """Samples and their token weights, end to end."""
    samples, pieces = [row.sample for row in rows], trees.pieces
    trained = [int(s.row.trained.sum()) for s in samples]

    def flat(parts: Iterable[npt.NDArray[np.generic]], dtype: npt.DTypeLike) -> Tensor:
        return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype))

    return MicroBatch(
        tokens=flat((rows[p.row].tokens[p.start : p.end] for p in pieces), np.int64),
        positions=flat((np.arange(p.start, p.end) for p in pieces), np.int64),
        lengths=tuple(p.end - p.start for p in pieces),
        source=flat(
            (at[np.flatnonzero(s.row.trained) - 1] for s, at in zip(samples, trees.places, strict=True)), np.int64
        ),
        target=flat((s.row.tokens[s.row.trained] for s in samples), np.int64),
        old_logprobs=flat((s.row.logprobs[s.row.trained] for s in samples), np.float32),
        advantages=flat((_credits(s) for s in samples), np.float32),
        weight=torch.from_numpy(np.repeat([row.weight for row in rows], trained).astype(np.float32)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(samples)), trained)),
        parents=tuple(p.parent for p in pieces) if any(p.parent >= 0 for p in pieces) else (),
    )
