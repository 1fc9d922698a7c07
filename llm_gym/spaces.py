"""`Tokens`: the space of token sequences, for contexts (observations) and completions (actions)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium.spaces import Space

from llm_gym.core import Ids
from llm_gym.errors import SettingError

SAMPLED_SPREAD = 64
"""Sampled lengths lie within this many tokens of `min_length`, so that random play stays cheap."""


class Tokens(Space[Ids]):
    """Sequences of token ids: 1-D arrays of `min_length` to `max_length` integers in [0, vocab_size).

    The canonical member is int32; `contains` accepts any integer dtype, since samplers hand over int64.
    Batches are tuples of ragged arrays, which is what Gymnasium does with every space it does not know:
    `SyncVectorEnv` and `AsyncVectorEnv(shared_memory=False)` work without registration.
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        min_length: int = 0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        if vocab_size < 1:
            raise SettingError(f"vocab_size: got {vocab_size!r}, want at least 1.")
        if not 0 <= min_length <= max_length:
            raise SettingError(f"min_length: got {min_length!r}, want 0 <= min_length <= max_length = {max_length!r}.")
        self.vocab_size, self.max_length, self.min_length = int(vocab_size), int(max_length), int(min_length)
        super().__init__(None, np.int32, seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: members have no common length."""
        return False

    def contains(self, x: Any) -> bool:
        """Whether `x` is a 1-D integer array with a length and ids in range."""
        if not isinstance(x, np.ndarray) or x.ndim != 1 or x.dtype.kind not in "iu":
            return False
        if not self.min_length <= x.size <= self.max_length:
            return False
        return x.size == 0 or bool(x.min() >= 0 and x.max() < self.vocab_size)

    def sample(self, mask: None = None, probability: None = None) -> Ids:
        """Uniform ids of a uniform length in [min_length, min_length + 63], int32 [n].

        A length of `max_length` is avoided where possible: an environment reads a full-length action
        without a stop token as a completion that was cut.

        Raises:
            ValueError: `mask` or `probability` was given.
        """
        if mask is not None or probability is not None:
            raise ValueError("Tokens.sample: mask and probability are not supported, pass None for both.")
        longest = max(self.min_length, min(self.max_length - 1, self.min_length + SAMPLED_SPREAD - 1))
        length = int(self.np_random.integers(self.min_length, longest + 1))
        return self.np_random.integers(0, self.vocab_size, length, dtype=np.int32)

    def to_jsonable(self, sample_n: Iterable[Ids]) -> list[list[int]]:
        """Members as lists of integers."""
        return [x.tolist() for x in sample_n]

    def from_jsonable(self, sample_n: list[list[int]]) -> list[Ids]:
        """The inverse of `to_jsonable`."""
        return [np.asarray(x, np.int32) for x in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and self._key() == other._key()

    def __repr__(self) -> str:
        least = f", min_length={self.min_length}" if self.min_length else ""
        return f"Tokens({self.vocab_size}, max_length={self.max_length}{least})"

    def _key(self) -> tuple[int, int, int]:
        return self.vocab_size, self.max_length, self.min_length
