"""Which groups a step trains on: filters by name, more groups played for those that did not pass, and left-overs.

Without filters a step trains on the groups it plays. With them, groups that do not pass are left out before
anything is counted; with `oversample.max_factor` above 1 more are played in their place, until every slot of the
step is filled or the bound is reached (dynamic sampling, https://arxiv.org/abs/2503.14476, section 3.2).

More are played at once than are missing, by the share that passed so far; what passed and found no slot is kept
for the next step. Such groups are one step old: they are trained on with the log-probabilities that they were
sampled with, so that ratios and importance corrections are those of the weights that sampled them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from llm_gym.core import Episode, Group, Task
from llm_gym.episode_files import decode, encode
from llm_gym.errors import CheckpointError, ConfigError
from llm_gym.harness.bounds import Within
from llm_gym.harness.data.filters import filters, judged, spread
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.distributed.groups import own_groups, share_groups, whole_on_rank0
from llm_gym.harness.distributed.world import World
from llm_gym.harness.settings import checked
from llm_gym.rollouts.player import Player

STATE = "data.json"
"""In a checkpoint: where the curricula are, and the groups that wait for a slot."""
AGE = 1
"""Steps for which a group that passed waits for a slot: else a run that is not ahead trains on no older token."""
SMOOTHING = 0.5
"""How much the newest round says about the share of groups that pass."""


@checked("oversample")
@dataclass(frozen=True)
class OversampleConfig:
    """How groups that do not pass the filters are replaced."""

    max_factor: Annotated[float, Within("[1, inf)")] = 1.0
    """Most groups played in a step, as a multiple of `prompts_per_step`; 1: none are replaced."""
    gone: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "max_age": (1, "groups that passed and found no slot wait for one step, or for as long as stream.max_staleness")
    }
    """Former settings: name -> (the value that changes nothing, what holds now)."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What a step played, and what it trains on."""

    groups: list[Group]
    """To be trained on, in the order of the step's slots; some may be of an earlier step."""
    played: list[Episode]
    """Every episode of this step, once."""
    dropped: list[Group]
    """Groups of this step that a filter left out."""
    metrics: dict[str, float]
    spans: list[tuple[int, float, float]] = field(default_factory=list)
    """(number of a task, when it began, when it was whole) of what was played ahead, by `time.perf_counter`."""

    @property
    def episodes(self) -> list[Episode]:
        """Those to be trained on, group by group."""
        return [episode for group in self.groups for episode in group.episodes]


class Selection:
    """Fills the slots of each step; see the top of this file.

    Args:
        tasks: what is played.
        count: slots of a step.
        chosen: the filters.
        oversample: how groups that do not pass are replaced.
        names: of the environments, in the order of `Task.env`.
        world: the ranks: each plays its share, and judges what it played.
    """

    def __init__(
        self,
        tasks: Tasks,
        count: int,
        chosen: Mapping[str, Any] | None = None,
        oversample: OversampleConfig | None = None,
        names: Sequence[str] = ("",),
        world: World | None = None,
    ) -> None:
        self.tasks, self.count, self.names, self.world = tasks, count, list(names), world or World()
        self.filters, self.oversample = filters(chosen or {}), oversample or OversampleConfig()
        self.budget = budget_of(count, self.oversample, self.filters)
        self.rates = [1.0] * len(self.names)
        """Share of each environment's groups that pass, smoothed."""
        self.kept: list[list[tuple[int, Group]]] = [[] for _ in self.names]
        """For each environment, (step that played it, group) of what passed and found no slot yet, oldest first."""

    def collect(self, step: int, player: Player) -> StepBatch:
        """Lets a step's groups be played, and chooses among them; `player` is given this rank's share of the tasks."""
        self.tasks.begin(step)
        slots = self.tasks.slots(self.count)
        played: list[Group] = []
        dropped: list[Group] = []
        while (missing := self._open(slots)) and len(played) < self.budget:
            tasks = self.tasks.draw(self._round(missing, self.budget - len(played)))
            places = self.world.shard(range(len(tasks)))
            mine = dict(zip(places, player.play([tasks[i] for i in places]), strict=True))
            judgements = {i: judged(group, self.filters) for i, group in mine.items()}
            fresh = list(share_groups(self.world, judgements, "rollout").values())
            played += fresh
            dropped += self._sort(step, fresh)
        self.tasks.learn(played)
        chosen = self._fill(slots)
        reused, expired = sum(born < step for born, _ in chosen), self._expire(step + 1)
        groups = [group for _, group in chosen]
        metrics = where_groups_went(self.filters, len(groups), played)
        if self.oversample.max_factor > 1:  # kept by the step before + played = trained + dropped + expired + kept
            left = {"reused": reused, "expired": expired, "kept": sum(map(len, self.kept))}
            metrics |= {f"groups/{name}": float(count) for name, count in left.items()}
        return StepBatch(groups, [episode for group in played for episode in group.episodes], dropped, metrics)

    def advance(self, step: int, player: Player) -> None:
        """New weights have reached the engine: nothing begins before it is waited for."""

    def put_back(self) -> None:
        """The step that was collected could not be played: its seeds are its own, so whoever goes on has them again."""

    def close(self) -> None:
        """Nothing is under way between two steps."""

    def save(self, folder: Path) -> None:
        """Writes everything that later steps depend on, groups that wait for a slot included; every rank calls it."""
        kept = [[[born, encoded(self.world, group)] for born, group in own] for own in self.kept]
        if self.world.rank != 0:
            return
        state = {"envs": self.names, "tasks": self.tasks.state_dict(), "rates": self.rates, "kept": kept}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Goes on where `save` was called.

        Raises:
            CheckpointError: it cannot be read, or is of other environments or another curriculum.
        """
        go_on(folder, self.names, self._load)

    # Inside

    def _load(self, state: Mapping[str, Any]) -> None:
        self.tasks.load_state_dict(state["tasks"])
        self.rates = list(state["rates"])
        self.kept = [
            [(born, _group(self.world, env, episodes)) for born, episodes in own]
            for env, own in enumerate(state["kept"])
        ]

    def _open(self, slots: Sequence[int]) -> list[int]:
        """The environments of the slots for which no group is ready."""
        ready = [len(own) for own in self.kept]
        missing = []
        for env in slots:
            ready[env] -= 1
            if ready[env] < 0:
                missing.append(env)
        return missing

    def _round(self, missing: Sequence[int], most: int) -> list[int]:
        """The environments to play next: as many groups as should fill what is missing, taken in turns."""
        wanted = {env: math.ceil(count / self.rates[env]) for env, count in Counter(missing).items()}
        dealt: Counter[int] = Counter()
        turns = []
        for env in list(missing) * math.ceil(self.oversample.max_factor):
            if dealt[env] < wanted[env]:
                dealt[env] += 1
                turns.append(env)
        return turns[:most]

    def _sort(self, step: int, fresh: Sequence[Group]) -> list[Group]:
        """Makes ready what passes, and learns how much that is; returns the others."""
        dropped = []
        tried: dict[int, list[bool]] = {}
        for group in fresh:
            env = group.task.env
            tried.setdefault(env, []).append(group.filtered is None)
            if group.filtered is None:
                self.kept[env].append((step, group))
            else:
                dropped.append(group)
        for env, passed in tried.items():
            seen = (1 - SMOOTHING) * self.rates[env] + SMOOTHING * sum(passed) / len(passed)
            self.rates[env] = max(seen, 1 / self.oversample.max_factor)
        return dropped

    def _fill(self, slots: Sequence[int]) -> list[tuple[int, Group]]:
        """Takes a group for every slot that has one, the oldest first."""
        return [self.kept[env].pop(0) for env in slots if self.kept[env]]

    def _expire(self, step: int) -> int:
        """Drops groups that `step` would find too old; returns how many."""
        before = sum(map(len, self.kept))
        self.kept = [[(born, group) for born, group in own if step - born <= AGE] for own in self.kept]
        return before - sum(map(len, self.kept))


def budget_of(count: int, oversample: OversampleConfig, chosen: Mapping[str, Any]) -> int:
    """Most groups that a step of `count` slots plays.

    Raises:
        ConfigError: groups are to be replaced, and no filter leaves any out.
    """
    if oversample.max_factor > 1 and not chosen:
        raise ConfigError("oversample.max_factor: there are no filters, so nothing is replaced; set filters.spread=0.")
    return math.floor(count * oversample.max_factor)


def where_groups_went(chosen: Iterable[str], trained: int, played: Sequence[Group]) -> dict[str, float]:
    """Metrics: how many groups a step trained on, and those that it played, by the filter that left them out."""
    flat = sum(not spread(group, 0) for group in played)
    left_out = Counter(group.filtered for group in played)
    return {
        "groups/trained": float(trained),
        "groups/zero_spread": flat / len(played) if played else math.nan,
        **{f"groups/dropped/{name}": float(left_out[name]) for name in chosen},
        "groups/played": float(len(played)),
    }


def encoded(world: World, group: Group) -> list[dict[str, Any]]:
    """A group that waits, for a checkpoint: whole on rank 0, empty on the others, which must ask too."""
    return [encode(episode) for episode in whole_on_rank0(world, group.episodes, "saving")]


def go_on(folder: Path, names: Sequence[str], load: Callable[[Mapping[str, Any]], None]) -> None:
    """Hands `load` the state in a checkpoint.

    Raises:
        CheckpointError: it cannot be read or used, or is of other environments than `names`.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["envs"] != list(names):
            raise ValueError(f"it is of the environments {state['envs']}, the run of {list(names)}")
        load(state)
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {str(folder / STATE)!r} cannot be used ({error}).") from error


def _group(world: World, env: int, episodes: Iterable[Mapping[str, Any]]) -> Group:
    """A group that waited for a slot: its tokens on the rank that played it."""
    every = tuple(decode(data) for data in episodes)
    (own,) = own_groups(world, [Group(Task(env, every[0].seed, every[0].task), every)])
    return own
