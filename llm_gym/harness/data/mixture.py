"""The environments of a run: one, or several with weights; each with a driver of its own, all with one policy."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from llm_gym.concurrency import run_here
from llm_gym.core import Episode, Group, Sampling, Task, group
from llm_gym.envs import NAMESPACE
from llm_gym.errors import ConfigError
from llm_gym.harness.bounds import Within
from llm_gym.harness.data.agents import NO_AGENT, AgentConfig
from llm_gym.harness.data.curriculum import CurriculumConfig
from llm_gym.harness.runs.metrics import describe
from llm_gym.harness.settings import checked
from llm_gym.policies import Completer
from llm_gym.rollouts.driver import OnEpisode


@checked("envs")
@dataclass(frozen=True)
class EnvConfig:
    """One environment of a mixture."""

    env: str = ""
    """Its id, as in `TrainConfig.env`."""
    weight: Annotated[float, Within("(0, inf)")] = 1.0
    """How many of a step's groups it gets, in proportion to the other weights."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, over those of the run."""
    name: str | None = None
    """What its episodes and metrics are called; None: its id. Needed where an id occurs twice."""
    curriculum: CurriculumConfig | None = None
    """Which rows of its data are played, and when; None: the run's."""

    def __post_init__(self) -> None:
        if not self.env:
            raise ConfigError("envs: an entry names no environment; want env, and perhaps weight, env_args, name.")


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """An environment that a run plays, with every decision about it made."""

    name: str
    """What its episodes call it (`Episode.env_id`)."""
    env_id: str
    """Full id."""
    args: Mapping[str, Any]
    """Its arguments in training."""
    eval_args: Mapping[str, Any]
    """Its arguments in evaluation."""
    weight: float
    curriculum: CurriculumConfig
    rows: int | None
    """Rows of its data; None: it draws tasks from seeds."""
    reward_weights: Mapping[str, float]
    limit: int
    """Most tokens in one completion."""
    chat: Any
    """Its chat, None if it has none."""
    agent: AgentConfig = NO_AGENT
    """Who plays its episodes."""

    @property
    def label(self) -> str:
        """The name in metrics: without our own namespace."""
        return self.name.removeprefix(f"{NAMESPACE}/")


def scoring(found: Sequence[EnvSpec], groups: Sequence[Group]) -> dict[str, Any]:
    """What `rewards_of` needs of the environment of each group."""
    by_name = {spec.name: spec for spec in found}
    of_group = [by_name[group.episodes[0].env_id] for group in groups]
    return {"weights": [spec.reward_weights for spec in of_group], "limit": [spec.limit for spec in of_group]}


def describe_each(found: Sequence[EnvSpec], episodes: Sequence[Episode]) -> dict[str, float]:
    """The metrics of each environment of a mixture, such as `reward/mean/GSM8K-v0`; nothing if there is one."""
    if len(found) == 1:
        return {}
    row: dict[str, float] = {}
    for spec in found:
        own = [episode for episode in episodes if episode.env_id == spec.name]
        told = describe(own) if own else {}
        row |= {f"{name}/{spec.label}": told[name] for name in EACH if name in told}
        row[f"groups/share/{spec.label}"] = len(own) / len(episodes) if episodes else 0.0
    return row


EACH = ("reward/mean", "reward/std", "episode/tokens_mean", "episode/truncated_fraction", "episode/failed_fraction")
"""Metrics that a mixture has for each environment."""


class Drivers:
    """A driver for every environment, all playing at once against one policy."""

    def __init__(self, found: Sequence[EnvSpec], policy: Completer, *, time_limit: float | None = None) -> None:
        self._drivers = [
            spec.agent.driver(spec.env_id, policy, env_args=spec.args, time_limit=time_limit, name=spec.name)
            for spec in found
        ]

    def play(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        sampling: Sampling,
        on_episode: OnEpisode | None = None,
    ) -> list[Group]:
        """A group of `group_size` episodes for every task, in the order of tasks."""
        options = {"group_size": group_size, "seed": seed, "sampling": sampling, "on_episode": on_episode}
        return run_here(self._play(tasks, group_size, options))

    async def play_group(self, task: Task, *, group_size: int, seed: int, sampling: Sampling) -> Group:
        """A group of one task, beside others that were begun."""
        driver = self._drivers[task.env]
        episodes = await driver.play_group(task.seed, task.row, group_size=group_size, run_seed=seed, sampling=sampling)
        return Group(task, tuple(episodes))

    async def _play(self, tasks: Sequence[Task], group_size: int, options: Mapping[str, Any]) -> list[Group]:
        places: dict[int, list[int]] = {}
        for place, task in enumerate(tasks):
            places.setdefault(task.env, []).append(place)
        running = []
        try:
            async with asyncio.TaskGroup() as players:
                for env, own in places.items():
                    seeds, rows = [tasks[i].seed for i in own], [tasks[i].row for i in own]
                    play = self._drivers[env].run_async(seeds, rows=rows, **options)
                    running.append((own, players.create_task(play)))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        groups: list[Group | None] = [None] * len(tasks)
        for own, player in running:
            for place, made in zip(own, group(player.result(), group_size), strict=True):
                groups[place] = replace(made, task=tasks[place])
        return [made for made in groups if made is not None]

    def publish(self, version: int) -> None:
        """New weights: their engine is here."""

    def close(self) -> None:
        """Closes every environment."""
        for driver in self._drivers:
            driver.close()


class PlayersElsewhere(ABC):
    """`Drivers` of other processes, each group of which is played on its own."""

    @abstractmethod
    async def play_group(self, task: Task, *, group_size: int, seed: int, sampling: Sampling) -> Group:
        """A group of one task, beside others that were begun."""

    def play(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        sampling: Sampling,
        on_episode: OnEpisode | None = None,
    ) -> list[Group]:
        """A group of `group_size` episodes for every task, in the order of tasks."""

        async def one(task: Task) -> Group:
            made = await self.play_group(task, group_size=group_size, seed=seed, sampling=sampling)
            if on_episode is not None:
                for episode in made.episodes:
                    on_episode(episode)
            return made

        async def every() -> list[Group]:
            return await asyncio.gather(*map(one, tasks))

        return run_here(every())
