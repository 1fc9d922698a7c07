"""Engine actors as the learner has them: made, given weights, asked for proof, and revived."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from llm_gym.errors import PolicyError, SettingError
from llm_gym.policies.ray.actor import EngineActor, Facts
from llm_gym.policies.ray.engines import Engines
from llm_gym.policies.ray.places import DEATHS, RESTARTS, Place, account, answer, begun
from llm_gym.policies.ray.weights import Tensors, Weights, stored
from llm_gym.policies.vllm_server.state import Ranks

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
log = logging.getLogger(__name__)


class RayPolicy(Engines):
    """A `WeightReceiver` on engine actors of the Ray cluster that this process has joined.

    An actor that dies is started again by Ray, wherever there is room, and given the weights by the first rank.

    Args:
        model: what the engines serve, a folder that every machine has or a hub id; None: the embedded model.
        kind: what each of them is, `transformers` or `vllm`.
        options: the arguments of that engine.
        engines: how many.
        gpus: of each.
        version: version of the weights in `model`.
        retry_seconds: how long a request waits for an engine to come back before it fails.
        on_wait: hears what is waited for.
        ranks: the processes that use them together, and load weights at the same time; None: this one alone.

    Raises:
        SettingError: an engine cannot start with these settings.
        PolicyError: an actor has died before it answered.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        kind: str = "transformers",
        options: Mapping[str, Any] | None = None,
        engines: int = 1,
        gpus: float = 0.0,
        version: int = 0,
        retry_seconds: float = 300.0,
        on_wait: Callable[[str], None] = log.warning,
        ranks: Ranks | None = None,
    ) -> None:
        rank, size = (ranks.rank, ranks.size) if ranks is not None else (0, 1)
        self._ranks, self._leads, self._tell = ranks, rank == 0, on_wait
        self.version, self.update_seconds = version, dict[str, float]()
        self._made: list[Any] = []
        self._reviving: set[Place] = set()

        def make() -> list[str]:
            actor = ray.remote(max_restarts=RESTARTS, max_task_retries=0, num_cpus=1, num_gpus=gpus)(EngineActor)
            arguments = (None if model is None else str(model), kind, dict(options or {}))
            names, self._made = begun("engine", actor, [{"scheduling_strategy": "SPREAD"}] * engines, *arguments)
            return names

        names = self._first(make)
        self.names = names
        """The engines', for players."""
        super().__init__(names, first=rank, clients=size, retry_seconds=retry_seconds)
        self.want = Weights(0, version)
        try:
            facts = self._first(lambda: self.places.loop.run(self._begin()))
        except BaseException:
            self.close()
            raise
        self.max_context, self.dtype = min(each.max_context for each in facts), facts[0].dtype

    def load(self, tensors: Tensors, *, version: int) -> None:
        """Gives every engine new weights; requests under way go on with them, their caches recomputed.

        An engine that is away gets them when it is back. Returns when at least one has them.

        Raises:
            PolicyError: an engine cannot load them, or none is there for `retry_seconds`.
        """
        if not self._leads:
            deque(tensors, maxlen=0)  # those of a split model must be gathered by all processes
        update = self.want.update + 1
        self._switch(lambda: Weights(update, version, update, stored(tensors)))

    def load_adapter(
        self, tensors: Iterable[tuple[str, torch.Tensor]], config: Mapping[str, Any], *, version: int
    ) -> None:
        """The same for an adapter alone, replaced in place; the weights beneath it stay."""
        update, config = self.want.update + 1, dict(config)
        self._switch(
            lambda: replace(self.want, update=update, version=version, adapter=(stored(tensors), config)),
        )

    def differing(self, expected: Mapping[str, int]) -> list[str]:
        """The tensors that some engine does not hold as the learner does."""

        async def ask() -> set[str]:
            found = await self._each(lambda place: place.actor.differing.remote(expected))
            return {name for names in found for name in names}

        wrong = self.places.loop.run(ask())
        return [name for name in expected if name in wrong]

    def close(self) -> None:
        """Ends the engines; requests under way fail with `PolicyError`."""
        super().close()
        for actor in self._made:
            ray.kill(actor)
        self._made = []

    def _first(self, make: Callable[[], T]) -> T:
        return make() if self._ranks is None else self._ranks.on_rank0(make, "weights for the engines")

    def _switch(self, make: Callable[[], Weights]) -> None:
        """All engines serve what `make` gives on the first rank; all ranks go on when the first has done so."""

        def send() -> Weights:
            began = time.monotonic()
            self.want = make()
            put = time.monotonic() - began
            took = [facts.seconds for facts in self.places.loop.run(self._bring())]
            names = {name for each in took for name in each}
            self.update_seconds = {name: max(each.get(name, 0.0) for each in took) for name in names}
            self.update_seconds["transfer"] = self.update_seconds.get("transfer", 0.0) + put
            return replace(self.want, pieces=(), adapter=None)

        weights = self._first(send)
        if not self._leads:
            self.want = weights
        self.least, self.version = weights.update, weights.version

    # Below here, coroutines run in the thread of `self.places.loop`.

    async def _begin(self) -> list[Facts]:
        try:
            facts = await asyncio.gather(*(answer(place.actor.hold.remote(self.want)) for place in self.places.every))
        except DEATHS as error:
            raise SettingError(f"cluster: an engine's process ended as it began: {account(error)}") from error
        self._watches = [asyncio.ensure_future(self._watch(place)) for place in self.places.every]
        return facts

    async def _bring(self) -> list[Facts]:
        found: list[Facts] = await self._each(lambda place: place.actor.hold.remote(self.want))
        return found

    async def _each(self, ask: Callable[[Place], Any]) -> list[Any]:
        """What every engine that is there answers, of at least one; an engine's own error is raised."""
        while True:
            await self.places.pick()
            asked = (answer(ask(place)) for place in self.places.every if place not in self._reviving)
            found = await asyncio.gather(*asked, return_exceptions=True)
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, DEATHS):
                    raise error
            if answers := [each for each in found if not isinstance(each, BaseException)]:
                return answers
            await asyncio.sleep(0.1)  # until `_watch` hears of the death, too

    async def _watch(self, place: Place) -> None:
        """Gives an engine that has died the weights as soon as it is back."""
        while True:
            try:
                await answer(place.actor.live.remote())
            except DEATHS as error:
                place.reason = account(error)
            self._reviving.add(place)
            self.places.leave(place, self.want.update)
            self._tell("cluster: an engine has died; it is started again, and its requests are repeated.")
            held = None
            try:
                while held is not self.want:
                    held = self.want
                    await answer(place.actor.hold_again.remote(held))
            except (*DEATHS, PolicyError, SettingError) as error:
                self._tell(f"cluster: an engine is lost: {account(error)}")
                return
            self._reviving.discard(place)  # nothing is awaited since the look at `want`: `_bring` knows it again
