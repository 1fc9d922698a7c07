"""Which cached row holds which tokens: the bookkeeping of the built-in engine."""

from __future__ import annotations

import numpy as np

from llm_gym.core import Ids
from llm_gym.policies.builtin.kv_cache import SlotCache

MOST_STOPS = 16
"""Most stop ids a request may have."""
ROW = np.dtype(
    [
        ("filled", "i8"),  # tokens whose keys and values are cached
        ("prompt", "i8"),  # length of the context
        ("limit", "i8"),  # most tokens to sample
        ("pending", "i8"),  # the token sampled last, not yet fed
        ("used", "i8"),  # when the row was last in flight
        ("seed", "u8"),
        ("temperature", "f8"),
        ("top_k", "i8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("stops", "i8", (MOST_STOPS,)),  # padded with -1
    ]
)
"""One row of the cache."""
WORTH_COPYING = 16
"""Shared prefixes shorter than this are computed again rather than copied."""


class Slots:
    """Rows [0, active) are in flight; the rest are idle (their tokens may be continued) or empty.

    The active rows are kept in front by swapping, so that a decoding step reads the cache without a copy.
    """

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache
        self.active = 0
        self.clock = 0
        self.rows = np.zeros(cache.rows, ROW)
        # One column more than there are tokens, never known: where every comparison ends.
        self.known = np.full((cache.rows, cache.length + 1), -1, np.int32)
        self.logprobs = np.zeros((cache.rows, cache.length), np.float32)

    def resize(self, rows: int, length: int) -> None:
        """Makes room for `rows` rows of `length` tokens; idle rows beyond are dropped."""
        self.cache.resize(rows, length)
        n, t = min(rows, len(self.rows)), min(length, self.logprobs.shape[1])
        before, self.rows = self.rows, np.zeros(rows, ROW)
        self.rows[:n] = before[:n]
        self.rows["filled"] = np.minimum(self.rows["filled"], length)
        known, self.known = self.known, np.full((rows, length + 1), -1, np.int32)
        self.known[:n, :t] = known[:n, :t]
        logprobs, self.logprobs = self.logprobs, np.zeros((rows, length), np.float32)
        self.logprobs[:n, :t] = logprobs[:n, :t]

    def place(self, context: Ids) -> int:
        """Gives `context` the next active row, with as much of its prefix cached as is known.

        The row that shares the longest prefix is continued in place if it is idle and wholly shared, else
        copied from. At least the last token is left to be fed, for its logits are needed.
        """
        source, shared = self._longest_prefix(context)
        lru = self._least_recently_used()
        whole = source >= self.active and shared == self.rows["filled"][source] > 0
        if not whole and shared < WORTH_COPYING:
            source, shared = lru, 0
        target = source if whole else lru
        if target != source:
            self.cache.copy(source, target, shared)
            self.known[target, :shared] = self.known[source, :shared]
        self.known[target, shared:] = -1
        self.rows["filled"][target] = shared
        self._swap(target, self.active)
        self.active += 1
        return self.active - 1

    def place_copy(self, leader: int) -> int:
        """Gives the next active row the whole context of an active row."""
        row, length = self.active, int(self.rows["filled"][leader])
        lru = self._least_recently_used()
        self.cache.copy(leader, lru, length)
        self.known[lru] = self.known[leader]
        self.rows["filled"][lru] = length
        self._swap(lru, row)
        self.active += 1
        return row

    def release(self, row: int) -> None:
        """Makes an active row idle; the last active row takes its place."""
        self.active -= 1
        self.clock += 1
        self.rows["used"][row] = self.clock
        self._swap(row, self.active)

    def forget(self) -> None:
        """Empties the idle rows."""
        self.known[self.active :] = -1
        self.rows["filled"][self.active :] = 0

    def _least_recently_used(self) -> int:
        """The row to give up: an empty one, or the idle one used longest ago."""
        idle = self.rows[self.active :]
        return self.active + int(np.where(idle["filled"] > 0, idle["used"], -1).argmin())

    def _longest_prefix(self, context: Ids) -> tuple[int, int]:
        """The row that shares the longest prefix with `context`, and that prefix's length."""
        n = len(context) - 1
        same = np.zeros((len(self.rows), n + 1), np.bool_)
        width = min(n, self.known.shape[1])
        same[:, :width] = self.known[:, :width] == context[:width]
        shared = same.argmin(axis=1)
        row = int(shared.argmax())
        return row, int(shared[row])

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        filled = self.rows["filled"]
        self.cache.swap(a, b, int(filled[a]), int(filled[b]))
        for table in (self.rows, self.known, self.logprobs):
            table[[a, b]] = table[[b, a]]
