"""Players in actors: environments on other processors, or on other machines, than the learner's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm_gym.core import Group, Sampling, Task
from llm_gym.harness.data.mixture import Drivers, EnvSpec, PlayersElsewhere
from llm_gym.harness.distributed.world import World
from llm_gym.policies.ray.engines import Engines
from llm_gym.policies.ray.places import RESTARTS, Places, begun
from llm_gym.policies.ray.policy import RayPolicy


class PlayerActor:
    """Plays groups against engine actors.

    Args:
        engines: their names.
        found: the run's environments.
        registered: how Gymnasium makes them; the module that registered them may not be imported here.
        time_limit: seconds an episode may take.
        players: how many such actors there are.
    """

    def __init__(
        self,
        engines: Sequence[str],
        found: Sequence[EnvSpec],
        registered: Sequence[Any],
        time_limit: float | None,
        players: int,
    ) -> None:
        for spec in registered:
            gymnasium.registry.setdefault(spec.id, spec)
        self._engines = Engines(engines, clients=players)
        self._drivers = Drivers(found, self._engines, time_limit=time_limit)

    async def here(self) -> None:
        """Returns when the actor has begun."""

    async def play(self, least: int, task: Task, how: Mapping[str, Any]) -> Group:
        """A group, sampled with the weights of update `least`, or later ones."""
        self._engines.least = max(self._engines.least, least)
        return await self._drivers.play_group(task, **how)

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    async def ready(self, least: int) -> None:
        """Returns when the actor is there; after its death too."""


class RemotePlayers(PlayersElsewhere):
    """`Drivers` whose environments are in actors. A group whose actor dies is played again, with the same seeds.

    Args:
        found: the run's environments.
        policy: the engines that sample.
        count: how many actors.
        time_limit: seconds an episode may take.
        world: the ranks, which share them.
    """

    def __init__(
        self, found: Sequence[EnvSpec], policy: RayPolicy, *, count: int, time_limit: float | None, world: World
    ) -> None:
        kind = ray.remote(max_restarts=RESTARTS, max_task_retries=0, num_cpus=1)(PlayerActor)
        registered = [gymnasium.spec(spec.env_id) for spec in found]
        plain = [replace(spec, chat=None) for spec in found]
        arguments = (policy.names, plain, registered, time_limit, count)
        self._policy, self._made = policy, list[Any]()

        def make() -> list[str]:
            names, self._made = begun("player", kind, _places(count), *arguments)
            return names

        names = world.on_rank0(make, "starting the players")
        self._places = Places("player", [ray.get_actor(name) for name in names], first=world.rank)

    async def play_group(self, task: Task, *, group_size: int, seed: int, sampling: Sampling) -> Group:
        """A group of one task, beside others that were begun."""
        how = {"group_size": group_size, "seed": seed, "sampling": sampling}
        least = self._policy.least
        asked = self._places.ask(lambda actor: actor.play.remote(least, task, how))
        _, made = await self._places.loop.ask(asked)
        group: Group = made
        return group

    def publish(self, version: int) -> None:
        """New weights: engine actors have them."""

    def close(self) -> None:
        """Ends the actors."""
        self._places.loop.stop()
        for actor in self._made:
            ray.kill(actor)


def _places(count: int) -> list[dict[str, Any]]:
    """Where each of them goes: machines without a GPU in turn, if the cluster has such and others; else anywhere."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    plain = [node["NodeID"] for node in nodes if not node["Resources"].get("GPU")]
    if not plain or len(plain) == len(nodes):
        return [{"scheduling_strategy": "SPREAD"}] * count
    ways = [NodeAffinitySchedulingStrategy(node_id=node, soft=True) for node in plain]
    return [{"scheduling_strategy": ways[i % len(ways)]} for i in range(count)]
