"""The built-in engine: continuous batching over a transformers model, sharing the learner's weights.

Every request is a coroutine awaiting a future; engine steps run inside the same event loop, between the
turns of those coroutines. There is no thread, so what is batched with what, and with it every float, depends
on nothing but the requests. A step feeds one token of every row in flight; new requests are prefilled as soon
as they arrive, and a row stays cached after its completion, for the next turn to continue it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from llm_gym.core import Completion, FinishReason, Ids, Sampling
from llm_gym.errors import PolicyError, SettingError
from llm_gym.policies.kv_cache import ATTENTION, SlotCache, attention
from llm_gym.policies.model import copy_weights, evaluating, load_model, max_context_of, probe, stop_ids_of
from llm_gym.policies.running import run_here
from llm_gym.policies.sampling import Knobs, draw, uniforms
from llm_gym.policies.slots import MOST_STOPS, Slots

ROUND = 64
"""Row lengths are multiples of this many tokens."""


@dataclass(eq=False, slots=True)
class _Request:
    context: Ids
    sampling: Sampling
    seed: int
    future: asyncio.Future[Completion]

    @property
    def length(self) -> int:
        """Tokens that its row must hold."""
        return len(self.context) + self.sampling.max_tokens


class TransformersPolicy:
    """Completions from a transformers model in this process, batched continuously.

    The module is held, not copied: after the learner's optimizer step call `refresh`. The engine runs it
    without gradients and in evaluation mode, and leaves its mode and attention implementation as they were.

    Args:
        model: a causal language model of transformers with full attention in every layer (LoRA welcome); or a
            folder or hub id to load one from; None: the embedded model.
        tokenizer: only asked for its end-of-sequence id, one more default stop id.
        max_context: most tokens of context and completion together; None: the model's own limit.
        max_rows: most requests in flight at once; more wait in line.
        cache_bytes: most memory of the key-value cache (a single request may exceed it).
        prefill_tokens: most tokens, padding included, in one prefill forward; None: 2048 on a CPU (more falls out
            of its caches and is slower), 16384 elsewhere.
        autocast_dtype: compute in this dtype by `torch.autocast`; None: in the parameters' dtype.
        device, dtype: where to load a model to, and as what; None: CUDA in bfloat16 if there is one, else the
            CPU in float32. Of no use for a module.
        version: version of the weights.

    Raises:
        SettingError: the model cannot be served exactly (sliding window, linear attention, soft-capping, ...).
    """

    def __init__(
        self,
        model: nn.Module | str | Path | None = None,
        tokenizer: Any = None,
        *,
        max_context: int | None = None,
        max_rows: int = 128,
        cache_bytes: int = 4 << 30,
        prefill_tokens: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        version: int = 0,
    ) -> None:
        model = model if isinstance(model, nn.Module) else load_model(model, device, dtype)
        self.model, self.version = model, version
        self.max_context = max_context_of(model, max_context)
        self.max_rows, self.cache_bytes = max_rows, cache_bytes
        self.stop_ids = stop_ids_of(model, tokenizer)
        self._autocast = autocast_dtype
        self._layout = probe(model, autocast_dtype)
        self.prefill_tokens = prefill_tokens or (2048 if self._layout.device.type == "cpu" else 16384)
        self._vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._waiting: deque[_Request] = deque()
        self._requests: list[_Request] = []  # those in flight, by row
        self._slots: Slots | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seeds = np.random.SeedSequence().generate_state(1, np.uint64)[0]

    # ---- the protocol

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion of `context`; whatever is in flight together is batched.

        Args:
            context: int32 [p], p >= 1.
            sampling: `max_tokens` is trimmed to what `max_context` leaves.
            seed: the completion's own random stream; None: one that has not been used.

        Raises:
            PolicyError: the context is empty, too long or out of the vocabulary, or the model failed.
        """
        loop = asyncio.get_running_loop()
        context, sampling = self._checked(context, sampling)
        if seed is None:
            self._seeds += np.uint64(1)
            seed = int(self._seeds)
        request = _Request(context, sampling, seed, loop.create_future())
        self._wake(loop)
        self._waiting.append(request)
        return await request.future  # cancelling the caller cancels the future; the next step drops the row

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order; `complete` for callers outside an event loop."""

        async def every() -> list[Completion]:
            drawn = seeds if seeds is not None else [None] * len(contexts)
            pairs = zip(contexts, drawn, strict=True)
            return await asyncio.gather(*(self.complete(c, sampling, seed=s) for c, s in pairs))

        return run_here(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Copies named weights (Hugging Face names, tied ones once or twice) into the module, all or nothing.

        Raises:
            PolicyError: names are unknown or missing, a shape differs, or requests are in flight.
        """
        self._refuse_in_flight("load")
        copy_weights(self.model, tensors)
        self.refresh(version=version)

    def refresh(self, *, version: int | None = None) -> None:
        """Drops everything cached and frees its memory; call it when the shared weights have changed.

        Args:
            version: the new weights' version; None: as before.

        Raises:
            PolicyError: requests are in flight.
        """
        self._refuse_in_flight("refresh")
        self._slots = None
        if version is not None:
            self.version = version

    def forget(self) -> None:
        """Drops the rows that are kept for a next turn; frees the cache's memory if nothing is in flight."""
        self._drop_cancelled()
        if not self._requests:
            self._slots = None
        elif self._slots is not None:
            self._slots.forget()

    def close(self) -> None:
        """Cancels what is in flight and frees the cache; the module is the caller's."""
        for request in [*self._waiting, *self._requests]:
            request.future.cancel()
        self._waiting.clear()
        self._requests.clear()
        self._slots = None

    # ---- requests

    def _checked(self, context: Ids, sampling: Sampling) -> tuple[Ids, Sampling]:
        context = np.asarray(context, np.int32)
        room = self.max_context - len(context)
        if context.ndim != 1 or not len(context):
            raise PolicyError(f"context: want token ids of shape [p], p >= 1, got shape {list(context.shape)}.")
        if room < 1:
            raise PolicyError(f"context: {len(context)} tokens leave no room in max_context={self.max_context}.")
        if context.min() < 0 or context.max() >= self._vocab_size:
            raise PolicyError(
                f"context: ids must lie in [0, {self._vocab_size}), got {context.min()}..{context.max()}."
            )
        stops = sampling.stop_token_ids if sampling.stop_token_ids is not None else self.stop_ids
        if len(stops) > MOST_STOPS:
            raise PolicyError(f"sampling.stop_token_ids: {len(stops)} ids, want at most {MOST_STOPS}.")
        return context, Sampling(
            sampling.temperature, min(sampling.max_tokens, room), sampling.top_k, sampling.top_p, sampling.min_p, stops
        )

    def _refuse_in_flight(self, what: str) -> None:
        self._drop_cancelled()
        if count := len(self._requests) + len(self._waiting):
            raise PolicyError(f"{what}: {count} requests are in flight; await or cancel them first.")

    def _drop_cancelled(self) -> None:
        if any(request.future.done() for request in self._waiting):
            self._waiting = deque(request for request in self._waiting if not request.future.done())
        for row in reversed(range(len(self._requests))):
            if self._requests[row].future.done():
                self._release(row)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes sure that engine steps are running in `loop`."""
        if self._loop is loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise PolicyError("policy: it is serving another event loop; one loop at a time.")
        self._loop = loop
        loop.call_soon(self._tick, 0)

    def _tick(self, pause: int) -> None:
        """One engine step, then the next one, after the loop has gone round."""
        loop = self._loop
        assert loop is not None
        if pause:  # finished episodes step their environments and send their next request now
            loop.call_soon(self._tick, pause - 1)
            return
        try:
            finished = self._step()
        except Exception as error:
            self._fail(error)
            finished = True
        if self._waiting or self._requests or finished:
            loop.call_soon(self._tick, 2 if finished else 0)
        else:
            self._loop = None

    def _fail(self, error: Exception) -> None:
        """Gives every request in flight the error of the step that broke; the cache may be half written."""
        failed = [*self._waiting, *self._requests]
        self._waiting.clear()
        self._requests.clear()
        self._slots = None
        for request in failed:
            if not request.future.done():
                wrapped = error if isinstance(error, SettingError) else PolicyError(f"engine step: {error!r}")
                wrapped.__cause__ = error if wrapped is not error else None
                request.future.set_exception(wrapped)

    # ---- one engine step

    def _step(self) -> bool:
        """Prefills what waits, feeds one token of every row, resolves what is complete; whether anything was."""
        self._drop_cancelled()
        finished = False
        if admitted := self._admit():
            self._prefill(admitted)
            finished = self._finish()
        if self._requests:
            self._decode()
            finished |= self._finish()
        return finished

    def _admit(self) -> list[_Request]:
        """Takes from the line what fits, in order, and makes room for it."""
        active = len(self._requests)
        length = self._slots.cache.length if self._slots else 0
        taken: list[_Request] = []
        while self._waiting:
            needed = max(length, -(-self._waiting[0].length // ROUND) * ROUND)
            allowed = min(self.max_rows, self.cache_bytes // (needed * self._layout.token_bytes))
            if active + len(taken) and active + len(taken) + 1 > allowed:
                break
            length = needed
            taken.append(self._waiting.popleft())
        if taken:
            self._reserve(active + len(taken), length)
        return taken

    def _reserve(self, rows: int, length: int) -> None:
        """At least so many rows of at least such a length, growing by doubling within the budget."""
        if self._slots is None:
            self._slots = Slots(SlotCache(self._layout))
        have_rows, have_length = self._slots.cache.rows, self._slots.cache.length
        if rows <= have_rows and length <= have_length:
            return
        if length > have_length:
            length = max(length, min(2 * have_length, -(-self.max_context // ROUND) * ROUND))
        allowed = min(self.max_rows, self.cache_bytes // (length * self._layout.token_bytes))
        if rows > have_rows:
            rows = max(rows, min(2 * have_rows, allowed))
        self._slots.resize(max(rows, min(have_rows, allowed)), length)

    def _prefill(self, requests: list[_Request]) -> None:
        """Computes the contexts that are not cached, each distinct one once, and draws the first tokens."""
        slots = self._slots
        assert slots is not None
        first = slots.active
        leaders: dict[bytes, int] = {}
        copies: list[tuple[_Request, int]] = []
        for request in requests:
            key = request.context.tobytes()
            if key in leaders:
                copies.append((request, leaders[key]))
                continue
            leaders[key] = slots.place(request.context)
            self._enter(request, leaders[key])
        logits = self._extend(np.arange(first, slots.active))
        for request, leader in copies:
            self._enter(request, slots.place_copy(leader))
        source = [*range(len(leaders)), *(leader - first for _, leader in copies)]
        self._draw(np.arange(first, slots.active), logits[source] if copies else logits)

    def _enter(self, request: _Request, row: int) -> None:
        """Writes a request's settings to its row."""
        slots, s = self._slots, request.sampling
        assert slots is not None
        record = slots.rows[row]
        record["prompt"], record["limit"] = len(request.context), s.max_tokens
        record["seed"] = request.seed & 0xFFFFFFFFFFFFFFFF
        record["temperature"], record["top_k"] = s.temperature, s.top_k
        record["top_p"], record["min_p"] = s.top_p, s.min_p
        record["stops"] = -1
        stops = s.stop_token_ids or ()
        record["stops"][: len(stops)] = stops
        self._requests.append(request)

    def _extend(self, rows: npt.NDArray[np.integer]) -> torch.Tensor:
        """Feeds what is missing of the contexts of `rows`; logits [len(rows), vocabulary] after their last tokens."""
        slots = self._slots
        assert slots is not None
        missing = slots.rows["prompt"][rows] - slots.rows["filled"][rows]
        logits: list[torch.Tensor | None] = [None] * len(rows)
        order = np.argsort(missing, kind="stable")
        while len(order):
            width = min(int(missing[order[0]]), self.prefill_tokens)
            batch = [order[0]]
            for i in order[1:]:
                if max(width, int(missing[i])) * (len(batch) + 1) > self.prefill_tokens:
                    break
                batch.append(i)
                width = int(missing[i])
            out = self._feed_contexts(rows[batch], width)
            missing[batch] -= np.minimum(missing[batch], width)
            for i, row_logits in zip(batch, out, strict=True):
                logits[i] = row_logits
            order = order[len(batch) :] if not missing[batch].any() else order
        return torch.stack([x for x in logits if x is not None])

    def _feed_contexts(self, rows: npt.NDArray[np.integer], width: int) -> torch.Tensor:
        """One forward over the next `width` (or fewer) context tokens of each row, padded on the left."""
        slots = self._slots
        assert slots is not None
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.full((len(rows), width), -1, np.int64)
        for i, row in enumerate(rows):
            start = int(slots.rows["filled"][row])
            new = self._requests[row].context[start : start + width]
            ids[i, width - len(new) :] = new
            positions[i, width - len(new) :] = np.arange(start, start + len(new))
            slots.known[row, start : start + len(new)] = new
            slots.rows["filled"][row] = start + len(new)
        contiguous = np.array_equal(rows, np.arange(slots.active)[: len(rows)])
        return self._forward(slice(0, len(rows)) if contiguous else rows, ids, positions)

    def _decode(self) -> None:
        """Feeds the pending token of every row in flight and draws the next."""
        slots = self._slots
        assert slots is not None
        rows = slots.rows[: slots.active]
        index = np.arange(slots.active)
        positions = rows["filled"].copy()
        slots.known[index, positions] = rows["pending"]
        rows["filled"] += 1
        logits = self._forward(slice(0, slots.active), rows["pending"][:, None].copy(), positions[:, None])
        self._draw(index, logits)

    def _forward(
        self,
        rows: slice | npt.NDArray[np.integer],
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
    ) -> torch.Tensor:
        """Logits [n, vocabulary] after the last column of `ids` [n, T]; -1 in `positions` marks padding."""
        slots, device = self._slots, self._layout.device
        assert slots is not None
        slots.cache.aim(rows, positions)
        seen = torch.from_numpy(np.maximum(positions, 0)).to(device)
        hidden = torch.arange(int(positions.max()) + 1, device=device) > seen[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._layout.dtype, device=device).masked_fill_(hidden, -torch.inf)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(attention(self.model, ATTENTION))
            stack.enter_context(evaluating(self.model))
            if self._autocast is not None:
                stack.enter_context(torch.autocast(device.type, self._autocast))
            output = self.model(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=mask,
                position_ids=seen,
                past_key_values=slots.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _draw(self, index: npt.NDArray[np.integer], logits: torch.Tensor) -> None:
        """Draws the next token of the rows `index` from `logits` [n, vocabulary]."""
        slots = self._slots
        assert slots is not None
        rows = slots.rows[index]
        uniform = uniforms(rows["seed"], rows["filled"] - rows["prompt"])
        knobs = Knobs(rows["temperature"], rows["top_k"], rows["top_p"], rows["min_p"])
        tokens, logprobs = draw(logits, knobs, uniform)
        slots.rows["pending"][index] = tokens.cpu().numpy()
        slots.logprobs[index, rows["filled"]] = logprobs.cpu().numpy()

    def _finish(self) -> bool:
        """Resolves every request whose last token was drawn; whether there was one."""
        slots = self._slots
        assert slots is not None
        rows = slots.rows[: slots.active]
        stopped = (rows["stops"] == rows["pending"][:, None]).any(axis=1)
        spent = rows["filled"] + 1 - rows["prompt"] >= rows["limit"]
        broken = ~np.isfinite(slots.logprobs[np.arange(slots.active), rows["filled"]])
        done = np.flatnonzero(stopped | spent | broken)
        for row in done[::-1].tolist():  # from the back, so that a swap never brings in one that is done
            future = self._requests[row].future
            if broken[row]:
                future.set_exception(PolicyError("engine: the model's logits are not finite."))
            else:
                future.set_result(self._completion(row, "stop" if stopped[row] else "length"))
            self._release(row)
        return bool(len(done))

    def _completion(self, row: int, reason: FinishReason) -> Completion:
        slots = self._slots
        assert slots is not None
        record = slots.rows[row]
        start, stop = int(record["prompt"]), int(record["filled"])
        tokens = np.append(slots.known[row, start:stop], np.int32(record["pending"]))
        return Completion(tokens, slots.logprobs[row, start : stop + 1].copy(), reason, self.version)

    def _release(self, row: int) -> None:
        """Makes a row idle, with the last row in flight taking its place."""
        assert self._slots is not None
        self._slots.release(row)
        self._requests[row] = self._requests[-1]
        self._requests.pop()
