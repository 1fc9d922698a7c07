"""What losses read: one value per trained token, and sums over the sequences that the tokens come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Streams:
    """Flat per-token streams of a micro-batch: M trained tokens of any number of sequences, no padding.

    A sequence is everything that the policy said in one context (`types.TrainSequence`). Its tokens are
    consecutive, in order, and never split over micro-batches.
    """

    logprobs: Tensor
    """Of the current policy, [M], differentiable."""
    old_logprobs: Tensor
    """Of the policy that the ratio is taken against, [M] (see `importance_sampling`)."""
    advantages: Tensor
    """[M]."""
    sequence: Tensor
    """Index of each token's sequence, from 0, int64 [M]."""
    entropy: Tensor
    """Of the distribution that each token was drawn from, under the current policy, in nats, [M]; a constant to the
    gradient (`LossConfig.entropy_weight` is the bonus that has one)."""


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum of `values` over its sequence, [M]."""
    sums = values.new_zeros(int(sequence.max()) + 1 if len(sequence) else 0)
    return sums.index_add(0, sequence, values)[sequence]


def sequence_mean(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the mean of `values` over its sequence, [M]."""
    return sequence_sum(values, sequence) / sequence_sum(torch.ones_like(values), sequence)


def suffix_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum of `values` over it and the later tokens of its sequence, [M].

    Summed in float64, so that what stands before a sequence in the micro-batch leaves no rounding in it.
    """
    exact = values.double()
    before = exact.cumsum(0) - exact
    first = torch.ones_like(sequence, dtype=torch.bool)
    first[1:] = sequence[1:] != sequence[:-1]
    start = before[first][first.cumsum(0) - 1]
    return (sequence_sum(exact, sequence) - (before - start)).to(values.dtype)


def same_shape(*streams: Tensor) -> None:
    """Checks that all are streams [M] of one length.

    Raises:
        ValueError: they are not.
    """
    shapes = [tuple(s.shape) for s in streams]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"loss: want per-token streams of one shape [M], got {shapes}.")
