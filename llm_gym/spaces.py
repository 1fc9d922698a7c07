"""`Tokens`: the space of token sequences, for contexts (observations) and completions (actions)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Space
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory

from llm_gym.core import Ids
from llm_gym.errors import SettingError

SAMPLED_SPREAD = 64
"""Sampled lengths lie within this many tokens of `min_length`, so that random play stays cheap."""


class Tokens(Space[Ids]):
    """Sequences of token ids: 1-D arrays of `min_length` to `max_length` integers in [0, vocab_size).

    The canonical member is int32; `contains` accepts any integer dtype, since samplers hand over int64.
    Batches are tuples of ragged arrays, in Gymnasium's vector environments too.

    >>> space = Tokens(vocab_size=512, max_length=8)
    >>> np.array([3, 511], np.int32) in space, np.array([512], np.int32) in space
    (True, False)
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


class SharedTokens(Sequence[Ids]):
    """The members that several processes wrote last, as views of the memory they share; a deep copy is a tuple.

    Args:
        rows: int32 [n, 1 + max_length]: the length of each, then its ids.
    """

    def __init__(self, rows: npt.NDArray[np.int32]) -> None:
        self._rows = rows

    @overload
    def __getitem__(self, index: int) -> Ids: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Ids]: ...
    def __getitem__(self, index: int | slice) -> Ids | Sequence[Ids]:
        if isinstance(index, slice):
            return SharedTokens(self._rows[index])
        row: Ids = self._rows[index]
        return row[1 : 1 + row[0]]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Ids]:
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo: Any) -> tuple[Ids, ...]:
        return tuple(ids.copy() for ids in self)


@create_shared_memory.register(Tokens)
def _create(space: Tokens, n: int = 1, ctx: Any = multiprocessing) -> Any:
    """Memory for `n` members, for Gymnasium's AsyncVectorEnv."""
    return ctx.Array("i", n * (1 + space.max_length))


@read_from_shared_memory.register(Tokens)
def _read(space: Tokens, shared_memory: Any, n: int = 1) -> SharedTokens:
    return SharedTokens(np.frombuffer(shared_memory.get_obj(), np.int32).reshape(n, 1 + space.max_length))


@write_to_shared_memory.register(Tokens)
def _write(space: Tokens, index: int, value: Ids, shared_memory: Any) -> None:
    if len(value) > space.max_length:
        raise ValueError(f"observation: got {len(value)} tokens, want at most {space.max_length}, as its space says.")
    rows = np.frombuffer(shared_memory.get_obj(), np.int32).reshape(-1, 1 + space.max_length)
    rows[index, 0], rows[index, 1 : 1 + len(value)] = len(value), value
