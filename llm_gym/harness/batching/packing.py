"""Sequences to packed micro-batches, with every denominator fixed beforehand.

A micro-batch is one flat row of tokens: sequences laid end to end, no padding; what several of them begin with
may stand there once (see `prefix_tree`). The layout is deterministic (sorted by length, or by tokens where beginnings
are shared; ties in the order given), so a run can be repeated bit for bit.

The loss of a step is `sum(weight * per-token loss)` over all its micro-batches. The weights come from
a normaliser that sees the WHOLE step before the first micro-batch is made; hence the gradient is the
same however the sequences were split, ordered or spread over ranks. A sequence whose gradient is known to be
zero (advantage 0, no KL or entropy term) is counted there but never computed, which changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_gym.core import Episode, Group, StopReason
from llm_gym.harness.algorithms.normalisers import normaliser_of
from llm_gym.harness.batching.prefix_tree import Forest, common, cut, forest, order
from llm_gym.harness.types import Batch, Floats, MicroBatch, TokenStreams, TrainSequence

CUT = (StopReason.TOKEN_LIMIT, StopReason.TIME_LIMIT)
"""Ends of episodes that a limit cut short."""


def sequences(episode: Episode, number: int = 0, advantage: float | Floats | None = None) -> list[TrainSequence]:
    """An episode as it is trained: a sequence for each trajectory in which something was sampled.

    Args:
        episode: it.
        number: what to call it in `TrainSequence.episode`.
        advantage: one value, or one for each turn [T]; None: no such stream.
    """
    found = []
    for i, trajectory in enumerate(episode.trajectories):
        if not trajectory.spans:
            continue  # nothing was sampled in it
        tokens, kept = episode.sequence(i), trajectory.of_tokens("trained")
        trained = trajectory.sampled + len(tokens) - len(trajectory.tokens)
        streams: dict[str, npt.NDArray[Any]] = {"old_logprobs": trajectory.logprobs[kept]}
        if advantage is not None:
            of_turn = np.asarray(advantage, np.float64)
            turns = trajectory.of_tokens("turn")[kept]
            streams["advantages"] = of_turn[turns] if of_turn.ndim else np.full(len(turns), of_turn)
        found.append(TrainSequence(tokens, trained[kept], streams, number))
    return found


def samples(
    groups: Iterable[Group], advantages: Floats | None = None, *, train_truncated: bool = True
) -> list[TrainSequence]:
    """The sequences that a step trains on.

    A failed episode gives none (it carries no token into any denominator either), nor does one that another rank
    played, which holds its tokens. With `train_truncated=False` neither does an episode that was cut by a limit (DAPO's
    overlong filtering): it keeps its place in its group's baseline, and is left out of the loss.

    Args:
        groups: P groups of G episodes.
        advantages: [P, G], or [P, G, T]: one for each turn; None: the sequences have none.
        train_truncated: whether episodes cut by length or time are trained on.
    """
    chosen = []
    number = 0
    for p, group in enumerate(groups):
        for g, episode in enumerate(group.episodes):
            number += 1
            if not episode.whole or episode.stop_reason.failed or (not train_truncated and episode.stop_reason in CUT):
                continue
            chosen += sequences(episode, number - 1, None if advantages is None else advantages[p][g])
    return chosen


def pack(
    rows: Sequence[TrainSequence],
    *,
    max_tokens: int,
    normaliser: str = "token_global",
    constant_length: int = 256,
    skip_zero: bool = False,
    share: bool = False,
    counts: Mapping[int, int] | None = None,
) -> Batch:
    """Lays sequences into micro-batches of at most `max_tokens` input tokens (a longer one goes alone).

    Args:
        rows: the step's sequences; those without a trained token are dropped.
        max_tokens: token budget of a micro-batch.
        normaliser: a name in `NORMALISERS`, or `package.module:function`.
        constant_length: see `normalisers.constant`.
        skip_zero: leave out sequences whose advantages are all 0. Exact if no other loss term is on.
        share: lay out once what several sequences of a micro-batch begin with (a group's prompt, the turns before a
            history was rewritten, a system prompt) where that saves enough. The gradient is the same; the model
            must read `parents` (`Backbone.shares`).
        counts: trained tokens of every episode of the step, by its number: the denominators are theirs. None: `rows`
            are the whole step.

    Raises:
        ValueError: a sequence whose first token is trained (nothing predicts it).
        ConfigError: an unknown normaliser.
    """
    kept = [s for s in rows if len(s.trained)]
    for s in kept:
        if s.trained[0] == 0:
            raise ValueError(f"rows: the first token of a row of episode {s.episode} is trained; nothing predicts it.")
    counts = trained_tokens(rows) if counts is None else counts
    numbers = sorted(counts)
    each = np.array([counts[number] for number in numbers], np.int64)
    weights = dict(zip(numbers, normaliser_of(normaliser)(each, constant_length).tolist(), strict=True))
    live = [_weighted(s, weights[s.episode]) for s in kept if not skip_zero or np.any(s.streams["advantages"] != 0)]
    live.sort(key=lambda s: -len(s.tokens))  # stable: neighbours of like length need little attention padding
    return Batch(tuple(_micro_batches(live, max_tokens, share)), int(each.sum()), len(numbers))


def trained_tokens(rows: Iterable[TrainSequence]) -> dict[int, int]:
    """How many tokens of each episode are trained, by its number; episodes without one are left out."""
    counts: Counter[int] = Counter()
    for row in rows:
        if len(row.trained):
            counts[row.episode] += len(row.trained)
    return dict(counts)


def _weighted(row: TrainSequence, weight: float) -> TrainSequence:
    """The sequence with its weight, and without its last tokens: from the last trained one on they predict nothing."""
    streams: dict[str, npt.NDArray[Any]] = {
        "source": row.trained - 1,
        "target": row.tokens[row.trained],
        "weight": np.full(len(row.trained), weight),
        **row.streams,
    }
    return replace(row, tokens=row.tokens[: row.trained[-1]], streams=streams)


def _micro_batches(rows: Sequence[TrainSequence], budget: int, share: bool) -> Iterator[MicroBatch]:
    if share:
        rows = [rows[i] for i in order([row.tokens for row in rows])]
    lengths = [len(row.tokens) for row in rows]
    alike = common([row.tokens for row in rows]) if share else [0] * len(rows)
    for first, last in cut(lengths, alike, budget):
        yield _micro(rows[first:last], forest(lengths[first:last], alike[first:last]))


def _micro(rows: Sequence[TrainSequence], trees: Forest) -> MicroBatch:
    """Sequences end to end."""
    pieces = trees.pieces
    streams = [
        {**row.streams, "source": places[row.streams["source"]], "sequence": np.full(len(row.trained), number)}
        for number, (row, places) in enumerate(zip(rows, trees.places, strict=True))
    ]

    def flat(parts: Iterable[npt.NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate([*parts]).astype(np.int64))

    return MicroBatch(
        tokens=flat(rows[p.row].tokens[p.start : p.end] for p in pieces),
        positions=flat(np.arange(p.start, p.end) for p in pieces),
        lengths=tuple(p.end - p.start for p in pieces),
        streams=TokenStreams.joined(streams),
        parents=tuple(p.parent for p in pieces) if any(p.parent >= 0 for p in pieces) else (),
    )
