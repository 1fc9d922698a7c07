"""What runs in an engine's actor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from llm_gym.concurrency import Loop
from llm_gym.core import Completion, Ids, Sampling
from llm_gym.policies import Abilities, make_policy
from llm_gym.policies.ray.weights import Weights, fetched


@dataclass(frozen=True)
class Facts:
    """What the learner must know of an engine that holds its weights."""

    max_context: int
    dtype: Any
    seconds: Mapping[str, float]
    """What the last new weights took, as `WeightReceiver.update_seconds`."""


class EngineActor:
    """An engine of this process, made when it is told its weights, and again when the actor was started again.

    Not with the actor: then what went wrong would be the actor's death, and no answer.

    Args:
        model: what it serves, as `make_policy` takes it.
        engine: a name of `policies.ENGINES`.
        options: the engine's own.
    """

    def __init__(self, model: str | None, engine: str, options: Mapping[str, Any]) -> None:
        self._make = partial(make_policy, model, engine=engine, **options)
        self._policy: Any = None
        self._update, self._base = -1, 0
        self._door, self._news = asyncio.Lock(), asyncio.Condition()

    async def here(self) -> None:
        """Returns when the actor has begun."""

    async def complete(self, least: int, context: Ids, sampling: Sampling, seed: int | None) -> Completion | None:
        """One completion; None if the engine does not hold the weights of update `least`, or later ones."""
        if self._update < least:
            return None
        done: Completion = await self._policy.complete(context, sampling, seed=seed)
        return done

    async def hold(self, weights: Weights) -> Facts:
        """Serves these weights, unless it serves newer ones; requests under way go on with them."""
        async with self._door:
            await asyncio.to_thread(self._take, weights)
        async with self._news:
            self._news.notify_all()
        return Facts(self._policy.max_context, self._policy.dtype, dict(self._policy.update_seconds))

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def hold_again(self, weights: Weights) -> None:
        """`hold` for an engine that has died: waits until the actor was started again."""
        await self.hold(weights)

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def ready(self, least: int) -> None:
        """Waits until it holds the weights of update `least`, or later ones; after its death too."""
        async with self._news:
            await self._news.wait_for(lambda: self._update >= least)

    async def differing(self, expected: Mapping[str, int]) -> list[str]:
        """The tensors that it does not hold as the learner does."""
        found: list[str] = await asyncio.to_thread(self._policy.differing, expected)
        return found

    async def live(self) -> None:
        """Never returns; who waits for it hears at once of the actor's death."""
        await asyncio.Event().wait()

    def _take(self, weights: Weights) -> None:
        if self._policy is None:
            self._policy = self._make(version=weights.version)
            Abilities.of(self._policy).serve_in(Loop("llm_gym-engine"))
        if weights.update <= self._update:
            return
        if weights.base != self._base:
            self._policy.load(fetched(weights.pieces), version=weights.version)
        if weights.adapter is not None:
            pieces, config = weights.adapter
            self._policy.load_adapter(fetched(pieces), config, version=weights.version)
        self._update, self._base = weights.update, weights.base
