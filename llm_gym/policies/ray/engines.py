"""Completions from engine actors; all that players have of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import ray

from llm_gym.core import Completion, Ids, Sampling
from llm_gym.policies.ray.places import Places
from llm_gym.policies.vllm_server.routing import pieces

PER_ENGINE = 128
"""Episodes under way at once, per engine."""


class Engines:
    """A `Completer` on engine actors. A request whose engine dies is repeated whole, with the same seed.

    Args:
        names: of actors that are `EngineActor`.
        first: which of equally busy ones comes first.
        clients: how many such objects use these engines together.
        retry_seconds: how long a request waits for an engine to come back before it fails.
    """

    def __init__(self, names: Sequence[str], *, first: int = 0, clients: int = 1, retry_seconds: float = 300.0) -> None:
        self.places = Places(
            "engine", [ray.get_actor(name) for name in names], first=first, retry_seconds=retry_seconds
        )
        self.max_rows = max(1, PER_ENGINE * len(names) // clients)
        self.least = 0
        """The oldest update whose weights may sample."""

    async def complete(self, context: Ids, sampling: Sampling, *, seed: int | None = None) -> Completion:
        """One completion; cancelling the awaiting task aborts the request in its engine.

        Raises:
            PolicyError: the engine refuses it, or there was none for `retry_seconds`.
        """
        return await self.places.loop.ask(self._complete(context, sampling, seed))

    def generate(
        self, contexts: Sequence[Ids], sampling: Sampling, *, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Completions of many contexts, in order."""
        of = seeds if seeds is not None else [None] * len(contexts)

        async def every() -> list[Completion]:
            pairs = zip(contexts, of, strict=True)
            return await asyncio.gather(*(self._complete(context, sampling, seed) for context, seed in pairs))

        return self.places.loop.run(every())

    def close(self) -> None:
        """Requests under way fail."""
        self.places.loop.stop()

    async def _complete(self, context: Ids, sampling: Sampling, seed: int | None) -> Completion:
        several, least = len(self.places.every) > 1, self.least
        place, done = await self.places.ask(
            lambda actor: actor.complete.remote(least, context, sampling, seed),
            least,
            pieces(context) if several else (),
        )
        if several:
            place.prefixes.add(pieces(np.concatenate([context, done.tokens])))
        completion: Completion = done
        return completion
