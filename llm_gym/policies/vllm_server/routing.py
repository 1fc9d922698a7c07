"""Which of several servers takes a request: the one that has its beginning cached, unless it is clearly busier."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from llm_gym.core import Ids

BLOCK = 32
"""Tokens per remembered piece of a context; engines cache in blocks of about this size."""
REMEMBERED = 1 << 16
"""Pieces remembered per server: two million tokens."""
SLACK = 4
"""A server with this many requests more than the least loaded one, and a quarter, is clearly busier."""


def choose(loads: Sequence[int], cached: Sequence[int]) -> int:
    """The index of the server that takes the next request.

    Among the servers that are not clearly busier than the least loaded one, that with the longest cached
    beginning; among equals the least loaded, then the first.

    Args:
        loads: requests under way at each server, at least one server.
        cached: tokens of the request's context that each server has computed before.
    """
    limit = busy(min(loads))
    near = (i for i, load in enumerate(loads) if load <= limit)
    return min(near, key=lambda i: (-cached[i], loads[i], i))


def busy(least: int) -> int:
    """The highest load that is not clearly more than `least`."""
    return least + SLACK + least // 4


def pieces(context: Ids) -> list[bytes]:
    """A key for the beginning of `context` (int32 [p]) at every full block: equal keys mean equal beginnings."""
    whole = np.ascontiguousarray(context[: len(context) // BLOCK * BLOCK], np.int32)
    chain = hashlib.blake2b(digest_size=16)
    keys = []
    for block in whole.reshape(-1, BLOCK):
        chain.update(block.tobytes())
        keys.append(chain.copy().digest())
    return keys


class Prefixes:
    """The beginnings that one server has computed lately; the oldest are forgotten first."""

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._capacity = capacity

    def add(self, keys: Iterable[bytes]) -> None:
        """Remembers a context by its `pieces`."""
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def cached(self, keys: Sequence[bytes]) -> int:
        """Tokens of a context, given as its `pieces`, whose beginning is remembered."""
        for count in range(len(keys), 0, -1):
            if keys[count - 1] in self._known:
                return count * BLOCK
        return 0

    def clear(self) -> None:
        """Forgets everything: the server's caches were dropped."""
        self._known.clear()
