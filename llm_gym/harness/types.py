"""What travels inside the harness: sequences to be trained, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_gym.core import Ids

Floats = npt.NDArray[np.float64]

STREAMS = {
    "source": torch.int64,  # where in the micro-batch's row the hidden state stands that predicts the token
    "target": torch.int64,  # the token's id
    "sequence": torch.int64,  # number of its sequence in the micro-batch, from 0
    "old_logprobs": torch.float32,  # the sampler's
    "advantages": torch.float32,  # what it is credited with
    "weight": torch.float32,  # what its loss weighs in the step's
    "proximal": torch.float32,  # the learner's log-probability before the first of several updates
    "teacher": torch.float32,  # a teacher's log-probability, in distillation
}
"""Every per-token input of a step, and its type; a new one is named here and nowhere else."""


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """Tokens of one uninterrupted context, and what is known of those that are trained."""

    tokens: Ids
    """Ids, int32 [n]."""
    trained: npt.NDArray[np.int64]
    """Where the trained ones stand, ascending, int64 [m]; never 0: nothing predicts the first token."""
    streams: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """Of the names in `STREAMS`, [m] each."""
    episode: int = 0
    """The episode that it belongs to; the sequences of one share that episode's weight."""

    def first(self, length: int) -> TrainSequence:
        """Its first `length` tokens."""
        kept = int(np.searchsorted(self.trained, length))
        streams = {name: stream[:kept] for name, stream in self.streams.items()}
        return replace(self, tokens=self.tokens[:length], trained=self.trained[:kept], streams=streams)


class TokenStreams(Mapping[str, Tensor]):
    """Named tensors [M] of M trained tokens, in one order; here alone they are moved, cut and put together.

    Raises:
        ValueError: a name that is not in `STREAMS`, or tensors of different lengths.
    """

    def __init__(self, streams: Mapping[str, Tensor]) -> None:
        if unknown := set(streams) - set(STREAMS):
            raise ValueError(f"streams: got {min(unknown)!r}, want names of {list(STREAMS)}.")
        if len(lengths := {len(stream) for stream in streams.values()}) > 1:
            raise ValueError(f"streams: want one length for all, got {sorted(lengths)}.")
        self._streams = dict(streams)

    @classmethod
    def joined(cls, parts: Sequence[Mapping[str, npt.NDArray[Any]]]) -> TokenStreams:
        """The streams of several sequences, one after another; those that all of them have."""
        names = [name for name in STREAMS if all(name in part for part in parts)]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in names}
        return cls({name: torch.from_numpy(array).to(STREAMS[name]) for name, array in whole.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def to(self, device: torch.device | str) -> TokenStreams:
        """The same on another device."""
        return TokenStreams({name: stream.to(device) for name, stream in self.items()})

    def at(self, rows: slice | Tensor) -> TokenStreams:
        """Some of the tokens: a slice, a mask bool [M] or indices."""
        return TokenStreams({name: stream[rows] for name, stream in self.items()})

    def having(self, **streams: Tensor) -> TokenStreams:
        """The same with these, new or in place of others."""
        return TokenStreams({**self._streams, **streams})


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row: N input tokens of S sequences, M trained tokens."""

    tokens: Tensor
    """Input ids, int64 [N]; a sequence ends before its last trained token, which is only a target."""
    positions: Tensor
    """Position ids, int64 [N], from 0 in every sequence."""
    lengths: tuple[int, ...]
    """Input tokens of each segment; they sum to N. A segment is a sequence, or what several sequences begin with, or
    what follows that."""
    streams: TokenStreams
    """What is known of each trained token, [M] each."""
    parents: tuple[int, ...] = ()
    """The segment that each goes on from, or -1. Depth-first: all that goes on from a segment, directly or not,
    follows it without a gap. Empty: none has a parent."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        moved = self.tokens.to(device), self.positions.to(device), self.lengths, self.streams.to(device)
        return MicroBatch(*moved, self.parents)

    def having(self, **streams: Tensor) -> MicroBatch:
        """The same with these streams, new or in place of others."""
        return replace(self, streams=self.streams.having(**streams))

    @property
    def trained(self) -> int:
        """Trained tokens, M."""
        return len(self.streams["target"])


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything of one optimizer step."""

    micro: tuple[MicroBatch, ...]
    tokens: int
    """Trained tokens, those of sequences not computed included: the denominator of token means."""
    episodes: int
    """Episodes with at least one trained token."""
