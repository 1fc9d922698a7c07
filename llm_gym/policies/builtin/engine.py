"""One step at a time: requests in, cached rows, completions out. Knows neither futures nor event loops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from llm_gym.core import Completion, FinishReason, Ids, Sampling
from llm_gym.errors import PolicyError
from llm_gym.policies.builtin.cache_slots import Slots
from llm_gym.policies.builtin.forward import Served, feed
from llm_gym.policies.builtin.kv_cache import SlotCache
from llm_gym.policies.builtin.sampling import Knobs, draw, uniforms

ROUND = 64
"""Row lengths are multiples of this many tokens."""
KEPT_BYTES = 1 << 28
"""A cache up to this size is kept between rollouts."""
Index = npt.NDArray[np.integer]


@dataclass(eq=False, slots=True)
class Request:
    """A completion to be made."""

    context: Ids
    """int32 [p]."""
    sampling: Sampling
    """`max_tokens` and `stop_token_ids` are final: trimmed to the context, the default ids filled in."""
    seed: int
    """Its random stream, 64 bits."""
    version: int = 0
    """Of the weights that draw its first token; known once it is in flight."""
    updates: list[tuple[int, int]] = field(default_factory=list)
    """(index of the first token, version) of the updates since, as in `Completion`."""

    @property
    def length(self) -> int:
        """Tokens that its row must hold, rounded up."""
        return -(-(len(self.context) + self.sampling.max_tokens) // ROUND) * ROUND


class Engine:
    """Continuous batching over a key-value cache whose rows outlive their requests.

    The arguments are those of `TransformersPolicy`; `served` is its model, proven.
    """

    def __init__(
        self,
        served: Served,
        *,
        max_context: int,
        max_rows: int,
        cache_bytes: int,
        prefill_tokens: int,
    ) -> None:
        self.served, self.layout = served, served.layout
        self.max_context, self.max_rows = max_context, max_rows
        self.cache_bytes, self.prefill_tokens = cache_bytes, prefill_tokens
        self.slots = Slots(SlotCache(self.layout))
        self._finite = True
        self.clear()

    def clear(self) -> None:
        """Drops everything: requests, cached rows, and the memory they took, unless it is little.

        Clearing new memory would cost a small model a sixth of its rollout. What follows does not depend on what is
        kept: the mask hides old keys and values (they are finite), and their length never limits the number of rows.
        """
        if self.served.lean is not None:
            self.served.lean.refresh()
        self.waiting: deque[Request] = deque()
        self.flying: list[Request] = []
        """The requests in flight, by row."""
        cache = self.slots.cache
        row_bytes = cache.length * self.layout.token_bytes
        little = cache.rows * row_bytes <= KEPT_BYTES and self.max_rows * row_bytes <= self.cache_bytes
        keep = little and self._finite
        self.slots = Slots(cache if keep else SlotCache(self.layout))
        self._finite = True

    @property
    def requests(self) -> list[Request]:
        """What is in flight or waiting."""
        return [*self.flying, *self.waiting]

    def forget(self) -> None:
        """Drops the rows kept for a next turn; as `clear` if nothing is in flight."""
        if self.requests:
            self.slots.forget()
        else:
            self.clear()

    def renew(self, version: int) -> None:
        """The weights have changed, to those of `version`; requests in flight go on with the new ones.

        Their keys and values are computed again: old ones beneath new weights move a token by up to half a nat.
        """
        if self.served.lean is not None:
            self.served.lean.refresh()
        self.slots.forget()
        for row, request in enumerate(self.flying):
            drawn = int(self.slots.rows["filled"][row] + 1 - self.slots.rows["prompt"][row])
            request.updates = [update for update in request.updates if update[0] < drawn] + [(drawn, version)]
        if self.flying and self.served.uncached is None:
            self.refill()

    def drop(self, unwanted: Callable[[Request], bool]) -> None:
        """Gives up requests."""
        self.waiting = deque(request for request in self.waiting if not unwanted(request))
        for row in reversed(range(len(self.flying))):
            if unwanted(self.flying[row]):
                self._release(row)

    def step(self, version: int) -> list[tuple[Request, Completion | PolicyError]]:
        """Feeds what waits and the last token of every row in flight, draws a token each; returns what is complete."""
        admitted = self._admit()
        if not self.flying and not admitted:
            return []
        for request in admitted:
            request.version = version
        decoding = self.slots.active
        copies = self._place(admitted)
        source = [*range(self.slots.active), *(leader for _, leader in copies)]
        logits = self._forward(decoding)
        for request, leader in copies:
            self._enter(request, self.slots.place_copy(leader))
        self._draw(logits[source] if copies else logits)
        return self._finish()

    def _admit(self) -> list[Request]:
        """Takes from the line what fits, in order, and makes room for it."""
        length, rows = self.slots.cache.length, len(self.flying)
        taken: list[Request] = []
        while self.waiting:
            needed = max(length, self.waiting[0].length)
            if rows and rows + 1 > self._rows_of(needed):
                break
            length, rows = needed, rows + 1
            taken.append(self.waiting.popleft())
        if taken:
            self._reserve(rows, length)
        return taken

    def _rows_of(self, length: int) -> int:
        """How many rows of `length` tokens may be held."""
        return min(self.max_rows, self.cache_bytes // (length * self.layout.token_bytes))

    def _reserve(self, rows: int, length: int) -> None:
        """At least so many rows of at least such a length, growing by doubling within the budget."""
        have_rows, have_length = self.slots.cache.rows, self.slots.cache.length
        if length > have_length:
            doubled = min(2 * have_length, -(-self.max_context // ROUND) * ROUND)
            length = doubled if doubled > length and rows <= self._rows_of(doubled) else length
        if rows > have_rows:
            rows = max(rows, min(2 * have_rows, self._rows_of(length)))
        else:
            rows = max(rows, min(have_rows, self._rows_of(length)))
        if (rows, length) != (have_rows, have_length):
            self.slots.resize(rows, length)

    def _place(self, requests: list[Request]) -> list[tuple[Request, int]]:
        """Gives each distinct context a row; the requests that repeat one come back, with that row."""
        leaders: dict[bytes, int] = {}
        copies: list[tuple[Request, int]] = []
        for request in requests:
            key = request.context.tobytes()
            if key in leaders:
                copies.append((request, leaders[key]))
            else:
                leaders[key] = self.slots.place(request.context)
                self._enter(request, leaders[key])
        return copies

    def _enter(self, request: Request, row: int) -> None:
        """Writes a request's settings to its row."""
        s, stops = request.sampling, request.sampling.stop_token_ids or ()
        record = self.slots.rows[row]
        record["prompt"], record["limit"] = len(request.context), s.max_tokens
        record["seed"] = request.seed & 0xFFFFFFFFFFFFFFFF
        record["temperature"], record["top_k"], record["top_p"], record["min_p"] = (
            s.temperature,
            s.top_k,
            s.top_p,
            s.min_p,
        )
        record["stops"] = -1
        record["stops"][: len(stops)] = stops
        self.flying.append(request)

    def _forward(self, decoding: int) -> torch.Tensor:
        """Feeds every row what it misses; logits [active, vocabulary] after the last tokens.

        The first `decoding` rows miss the token sampled last, the others some of their contexts.
        """
        if self.served.uncached is not None:
            return self._anew(decoding)
        rows = self.slots.rows[: self.slots.active]
        missing = rows["prompt"] - rows["filled"]
        missing[:decoding] = 1
        found: list[torch.Tensor] = []
        order: list[int] = []
        for batch in self._batches(missing, decoding):
            for _ in range(0, int(missing[batch].max()), self.prefill_tokens):
                logits = self._feed(batch, decoding)
            found.append(logits)
            order.extend(batch)
        return found[0] if len(found) == 1 else torch.cat(found)[np.argsort(order)]

    def _anew(self, decoding: int) -> torch.Tensor:
        """Logits after the last tokens of all rows of a model that cannot be cached, [active, vocabulary]."""
        table, known = self.slots.rows, self.slots.known
        old, fill = np.arange(decoding), table["filled"]
        known[old, fill[old]] = table["pending"][old]
        fill[old] += 1
        for row in range(decoding, self.slots.active):
            context = self.flying[row].context
            known[row, : len(context)] = context
            fill[row] = len(context)
        return self.served.whole([known[i, : fill[i]] for i in range(self.slots.active)], self.prefill_tokens)

    def _batches(self, missing: Index, decoding: int) -> Iterator[Index]:
        """Rows that are fed together: all, where padding is left out; else those that miss about as much.

        A batch has at most `prefill_tokens` tokens, padding included, unless it only decodes.
        """
        quick = self.served.lean is not None and self.served.lean.usable
        if decoding == len(missing) or (quick and missing.sum() <= self.prefill_tokens):
            yield np.arange(len(missing))
            return
        if decoding:
            yield np.arange(decoding)
        order = decoding + np.argsort(missing[decoding:], kind="stable")
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and missing[order[stop]] * (stop + 1 - start) <= self.prefill_tokens:
                stop += 1
            yield np.sort(order[start:stop])  # neighbouring rows are read without a copy
            start = stop

    def _feed(self, rows: Index, decoding: int) -> torch.Tensor:
        """One forward over the next tokens of each of `rows`, padded on the left so that all end together."""
        table, known = self.slots.rows, self.slots.known
        fill = table["filled"]
        old, new = rows[rows < decoding], rows[rows >= decoding]
        missing = (table["prompt"] - fill)[new]
        width = int(min(self.prefill_tokens, missing.max(initial=1)))
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.full((len(rows), width), -1, np.int64)
        ids[: len(old), -1], positions[: len(old), -1] = table["pending"][old], fill[old]
        known[old, fill[old]] = table["pending"][old]
        fill[old] += 1
        for i, row in enumerate(new, len(old)):
            start = int(fill[row])
            tokens = self.flying[row].context[start : start + width]
            ids[i, width - len(tokens) :] = tokens
            positions[i, width - len(tokens) :] = np.arange(start, start + len(tokens))
            known[row, start : start + len(tokens)] = tokens
            fill[row] += len(tokens)
        neighbours = rows[-1] - rows[0] == len(rows) - 1
        return feed(self.served, self.slots.cache, slice(rows[0], rows[-1] + 1) if neighbours else rows, ids, positions)

    def refill(self) -> None:
        """Feeds every row in flight again all that it was fed before."""
        known, filled = self.slots.known, self.slots.rows["filled"][: self.slots.active].copy()
        for batch in self._batches(filled, 0):
            for start in range(0, int(filled[batch].max()), self.prefill_tokens):
                stops = np.minimum(filled[batch], start + self.prefill_tokens)
                width = int((stops - start).max())
                ids = np.zeros((len(batch), width), np.int64)
                positions = np.full((len(batch), width), -1, np.int64)
                for i, (row, stop) in enumerate(zip(batch, stops, strict=True)):
                    ids[i, width - (stop - start) :] = known[row, start:stop]
                    positions[i, width - (stop - start) :] = np.arange(start, stop)
                feed(self.served, self.slots.cache, batch, ids, positions)

    def _draw(self, logits: torch.Tensor) -> None:
        """Draws the next token of every row in flight from `logits` [active, vocabulary]."""
        rows = self.slots.rows[: self.slots.active]
        uniform = uniforms(rows["seed"], rows["filled"] - rows["prompt"])
        knobs = Knobs(rows["temperature"], rows["top_k"], rows["top_p"], rows["min_p"])
        tokens, logprobs = draw(logits, knobs, uniform)
        rows["pending"] = tokens.cpu().numpy()
        self.slots.logprobs[np.arange(len(rows)), rows["filled"]] = logprobs.cpu().numpy()

    def _finish(self) -> list[tuple[Request, Completion | PolicyError]]:
        """The requests whose last token was drawn; their rows become idle."""
        rows = self.slots.rows[: self.slots.active]
        stopped = (rows["stops"] == rows["pending"][:, None]).any(axis=1)
        spent = rows["filled"] + 1 - rows["prompt"] >= rows["limit"]
        broken = ~np.isfinite(self.slots.logprobs[np.arange(self.slots.active), rows["filled"]])
        self._finite &= not broken.any()
        done: list[tuple[Request, Completion | PolicyError]] = []
        for row in np.flatnonzero(stopped | spent | broken)[::-1].tolist():  # from the back: swaps bring in none done
            if broken[row]:
                done.append((self.flying[row], PolicyError("engine: the model's logits are not finite.")))
            else:
                done.append((self.flying[row], self._completion(row, "stop" if stopped[row] else "length")))
            self._release(row)
        return done[::-1]

    def _completion(self, row: int, reason: FinishReason) -> Completion:
        record, request = self.slots.rows[row], self.flying[row]
        start, stop = int(record["prompt"]), int(record["filled"])
        tokens = np.append(self.slots.known[row, start:stop], np.int32(record["pending"]))
        logprobs = self.slots.logprobs[row, start : stop + 1].copy()
        return Completion(tokens, logprobs, reason, request.version, tuple(request.updates))

    def _release(self, row: int) -> None:
        """Makes a row idle, with the last row in flight taking its place."""
        self.slots.release(row)
        self.flying[row] = self.flying[-1]
        self.flying.pop()
