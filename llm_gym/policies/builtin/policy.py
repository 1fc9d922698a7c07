"""The built-in policy: continuous batching over a transformers model, sharing the learner's weights.

Every request is a coroutine awaiting a future; engine steps run inside the same event loop, between the
turns of those coroutines. There is no thread, so what is batched with what, and with it every float, depends
on nothing but the requests. A step feeds one token of every row in flight; new requests are prefilled as soon
as they arrive, and a row stays cached after its completion, for the next turn to continue it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llm_gym.concurrency import Loop, run_here
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.errors import PolicyError, SettingError, check_counts
from llm_gym.models.checksums import checksum
from llm_gym.models.loading import copy_weights, load_for_inference, stop_ids_of
from llm_gym.policies.builtin.cache_slots import MOST_STOPS
from llm_gym.policies.builtin.engine import Engine, Request
from llm_gym.policies.builtin.forward import vocabulary_of
from llm_gym.policies.builtin.probing import settle

PAUSE = 2
"""Extra rounds of the event loop after a completion: a caller that awaits through tasks needs as many to go on."""


class TransformersPolicy:
    """Completions from a transformers model in this process, batched continuously.

    A module is held, not copied: after the learner's optimizer step call `refresh`. The engine runs it
    without gradients and in evaluation mode, and leaves its mode and attention implementation as they were.

    Args:
        model: a causal language model of transformers (LoRA welcome), or a folder or hub id to load one from; None:
            the embedded model. One that keeps more than keys and values of one shape (recurrent layers, ...) is
            served without a cache, slowly.
        tokenizer: only asked for its end-of-sequence id, one more default stop id.
        max_context: most tokens of context and completion together; None: the model's own limit, or less where
            what it does further on cannot be done with a cache. If more is asked for, nothing is cached.
        max_rows: most requests in flight at once; more wait in line.
        cache_bytes: most memory of the key-value cache (a single request may exceed it).
        prefill_tokens: most tokens, padding included, in one prefill forward; None: 2048 on a CPU (more falls
            out of its caches and is slower), 16384 elsewhere.
        autocast_dtype: compute in this dtype by `torch.autocast`; None: in the parameters' dtype.
        device, dtype: where to load a model to, and as what; None: CUDA in bfloat16 if there is one, else the
            CPU in float32. Of no use for a module.
        version: version of the weights.

    Raises:
        SettingError: the model cannot be served exactly, or not up to `max_context`.
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
        check_counts({"max_context": max_context, "max_rows": max_rows, "cache_bytes": cache_bytes})
        check_counts({"prefill_tokens": prefill_tokens})
        self.model = model if isinstance(model, nn.Module) else load_for_inference(model, device, dtype)
        self.dtype = next(self.model.parameters()).dtype
        self.update_seconds: dict[str, float] = {}
        self.version, self.max_rows = version, max_rows
        self.stop_ids = stop_ids_of(self.model, tokenizer)
        self._vocabulary = vocabulary_of(self.model)
        served, self.max_context = settle(self.model, autocast_dtype, max_context)
        self.cached = served.uncached is None
        """Whether keys and values are cached; else every token computes its whole row again."""
        self.engine = Engine(
            served,
            max_context=self.max_context,
            max_rows=max_rows,
            cache_bytes=cache_bytes,
            prefill_tokens=prefill_tokens or (2048 if served.layout.device.type == "cpu" else 16384),
        )
        self._futures: dict[Request, asyncio.Future[Completion]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: Loop | None = None
        self._turn = threading.Lock()
        self._seeds = np.random.default_rng()

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion of `context`; whatever is in flight together is batched.

        Args:
            context: int32 [p], p >= 1.
            sampling: `max_tokens` is trimmed to what `max_context` leaves.
            seed: the completion's own random stream; None: a new one.

        Raises:
            PolicyError: the context is empty, too long or out of the vocabulary, or the model failed.
        """
        if self._home is not None and not self._home.inside:
            return await self._home.ask(self.complete(context, sampling, seed=seed))
        loop = asyncio.get_running_loop()
        seed = int(self._seeds.integers(1 << 63)) if seed is None else seed
        request = self._request(context, sampling, seed)
        with self._alone():
            self._wake(loop)
            future = self._futures[request] = loop.create_future()
            self.engine.waiting.append(request)
        done: Completion = await future  # a cancelled caller cancels the future, and the next step drops the request
        return done

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order; the blocking form of `complete`."""

        async def every() -> list[Completion]:
            pairs = zip(contexts, seeds if seeds is not None else [None] * len(contexts), strict=True)
            return await asyncio.gather(*(self.complete(c, sampling, seed=s) for c, s in pairs))

        return run_here(every())

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Copies named weights (Hugging Face names, tied ones once or twice) into the module, all or nothing.

        Requests in flight go on with the new weights, what they had cached is computed again, and their completions
        say from which token on.

        Raises:
            PolicyError: names are unknown or missing, or a shape differs.
        """
        with self._alone():
            self._drop_cancelled()
            copy_weights(self.model, tensors)
            if self._futures:
                self.engine.renew(version)
            else:
                self.engine.clear()
            self.version = version

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """The tensors whose checksums (see `checksums`) are not these, by name."""
        every = self.model.state_dict()
        return [name for name, value in expected.items() if name not in every or checksum(every[name]) != value]

    def refresh(self, *, version: int | None = None) -> None:
        """Drops everything cached; call it when the shared weights have changed.

        Args:
            version: the new weights' version; None: as before.

        Raises:
            PolicyError: requests are in flight.
        """
        self._refuse_in_flight("refresh")
        self.engine.clear()
        self.version = self.version if version is None else version

    def forget(self) -> None:
        """Drops the rows kept for a next turn: what follows depends on nothing that came before."""
        with self._alone():
            self._drop_cancelled()
            self.engine.forget()

    def serve_in(self, loop: Loop) -> None:
        """From now on requests live in `loop`, whichever loop they come from; other threads may load weights."""
        self._home = loop

    def paused(self) -> AbstractContextManager[object]:
        """While it lasts the engine makes no step: a learner in another thread has the processor to itself."""
        return self._turn

    def close(self) -> None:
        """Cancels what is in flight and frees the cache; the module is the caller's."""
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()
        self.engine.clear()

    def _request(self, context: Ids, sampling: Sampling, seed: int) -> Request:
        """A request that the engine can serve."""
        context = np.asarray(context)
        room = self.max_context - len(context)
        if context.ndim != 1 or not len(context) or context.dtype.kind not in "iu":
            shape = f"{context.dtype} {list(context.shape)}"
            raise PolicyError(f"context: got an array {shape}, want token ids of shape [p], p >= 1.")
        if room < 1:
            raise PolicyError(f"context: {len(context)} tokens leave no room in max_context={self.max_context}.")
        low, high = int(context.min()), int(context.max())
        if low < 0 or high >= self._vocabulary:
            raise PolicyError(f"context: ids must lie in [0, {self._vocabulary}), got {low} to {high}.")
        stops = sampling.stop_token_ids if sampling.stop_token_ids is not None else self.stop_ids
        if len(stops) > MOST_STOPS:
            raise SettingError(f"sampling.stop_token_ids: got {len(stops)} ids, want at most {MOST_STOPS}.")
        final = replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_token_ids=stops)
        return Request(context.astype(np.int32), final, seed)

    def _refuse_in_flight(self, what: str) -> None:
        self._drop_cancelled()
        if self._futures:
            raise PolicyError(f"{what}: {len(self._futures)} requests are in flight; await or cancel them first.")

    def _drop_cancelled(self) -> None:
        unwanted = {request for request, future in self._futures.items() if future.done()}
        if unwanted:
            self.engine.drop(unwanted.__contains__)
            for request in unwanted:
                del self._futures[request]

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes sure that engine steps are running in `loop`."""
        if self._loop is loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise PolicyError("policy: it is serving another event loop; one loop at a time.")
        self._loop = loop
        loop.call_soon(self._tick, loop, 0)

    def _tick(self, loop: asyncio.AbstractEventLoop, pause: int) -> None:
        """One engine step, then the next one, after the loop has gone round.

        After a completion it goes round some more: the finished episodes step their environments and send
        their next requests, which then are batched.
        """
        if pause:
            loop.call_soon(self._tick, loop, pause - 1)
            return
        finished = self._step()
        if self._futures or finished:
            loop.call_soon(self._tick, loop, PAUSE if finished else 0)
        else:
            self._loop = None

    def _alone(self) -> AbstractContextManager[object]:
        """While nobody else reads or writes weights, cache or requests."""
        return self._turn if self._home is None else self._home.waiting_for(self._turn)

    def _step(self) -> bool:
        """One engine step; whether a request was settled."""
        with self._alone():
            return self._step_alone()

    def _step_alone(self) -> bool:
        self._drop_cancelled()
        try:
            done = self.engine.step(self.version)
        except Exception as error:  # the cache may be half written: everything in flight is lost
            failed = error if isinstance(error, SettingError) else PolicyError(f"engine step: {error!r}")
            for future in self._futures.values():
                future.set_exception(failed)
            self._futures.clear()
            self.engine.clear()
            return True
        for request, outcome in done:
            future = self._futures.pop(request)
            if isinstance(outcome, Completion):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)
        return bool(done)
