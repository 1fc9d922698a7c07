"""Groups that are played ahead of the steps that train on them: rollouts go on while the learner learns.

Tasks are numbered, and `rollouts.scheduler` says which may begin; whole groups wait in `rollouts.buffer`. A step takes
the next numbers in their order, waits for those that are not whole yet, and leaves out what does not pass the filters,
with later numbers in their place as far as `oversample.max_factor` allows. What was begun and not yet used stays where
it is: nothing is dropped for its age, and each number ends once, as trained, filtered or failed. Every process of a run
keeps the same numbers, and number n is played by rank n modulo their count.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from llm_gym.access import loopback, token_of
from llm_gym.core import Group, Task
from llm_gym.episode_files import decode
from llm_gym.errors import ConfigError
from llm_gym.harness.bounds import Within
from llm_gym.harness.data.filters import filters, judged
from llm_gym.harness.data.selection import (
    STATE,
    OversampleConfig,
    StepBatch,
    budget_of,
    encoded,
    go_on,
    where_groups_went,
)
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.distributed.groups import own_groups, share_groups
from llm_gym.harness.distributed.world import World
from llm_gym.harness.settings import checked
from llm_gym.rollouts.buffer import Entry, RolloutBuffer
from llm_gym.rollouts.player import Player
from llm_gym.rollouts.scheduler import Scheduler

STRAGGLES = 4.0
"""A group is a straggler if it takes so many times as long as half of the others."""


@checked("stream")
@dataclass(frozen=True)
class StreamConfig:
    """How far rollouts may be ahead of the learner."""

    max_staleness: Annotated[int, Within("[0, inf)")] = 0
    """Updates of the weights that a token may be old when it is trained on; 0: every step plays, then trains."""
    sync_every: Annotated[int, Within("[1, inf)")] = 1
    """Steps between two updates of the engine's weights; what it samples meanwhile is older by that."""
    serve: str | None = None
    """Where tasks are handed out, `host:port` or `:port` (127.0.0.1): `llmgym work` plays them, and here nothing but
    evaluation. Beyond this machine the variable LLM_GYM_TOKEN must hold a token."""
    serve_weights: bool = False
    """Whether players may download the weights, for engines of their own (`llmgym work --policy`)."""
    lease_seconds: Annotated[float, Within("(0, inf)")] = 60.0
    """Seconds after which a task is handed out again, unless its player has said that it is still at it."""

    def __post_init__(self) -> None:
        self.address()
        if self.serve_weights and self.serve is None:
            raise ConfigError("stream.serve_weights: got True without stream.serve, so nobody could ask for them.")
        if self.sync_every > 1 + self.max_staleness:
            raise ConfigError(
                f"stream.sync_every: got {self.sync_every}, which makes tokens {self.sync_every - 1} updates old; "
                f"want at most {1 + self.max_staleness}, or stream.max_staleness={self.sync_every - 1}."
            )

    def address(self) -> tuple[str, int]:
        """Host and port of `serve`.

        Raises:
            ConfigError: it is no such address.
        """
        host, colon, port = (self.serve or ":0").rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"stream.serve: got {self.serve!r}, want host:port or :port, such as :8900.")
        return host.strip("[]") or "127.0.0.1", int(port)

    def check_served(self, *, ranks: int, players: int) -> None:
        """Looks whether tasks can be handed out, in a run of so many processes and of so many players on a cluster.

        Raises:
            ConfigError: they cannot, or others could reach them without a token.
        """
        if self.serve is None:
            return
        if ranks > 1:
            raise ConfigError(
                f"stream.serve: got {self.serve!r} with {ranks} processes; one process can hand out tasks."
            )
        if players:
            raise ConfigError(f"stream.serve: got {self.serve!r} with cluster.players={players}; pass one of them.")
        if not loopback(self.address()[0]) and not token_of(None):
            raise ConfigError(
                f"stream.serve: got {self.serve!r}, where others reach it too, without a token; set LLM_GYM_TOKEN."
            )


class Stream:
    """Fills the slots of each step from groups that were begun earlier; see the top of this file.

    Args:
        tasks: what is played.
        count: slots of a step.
        max_staleness: updates that a token may be old.
        steps: of the whole run; nothing begins that no step is left for.
        chosen: the filters.
        oversample: how groups that do not pass are replaced.
        names: of the environments, in the order of `Task.env`.
        world: the ranks.
    """

    def __init__(
        self,
        tasks: Tasks,
        count: int,
        max_staleness: int,
        steps: int,
        chosen: Mapping[str, Any] | None = None,
        oversample: OversampleConfig | None = None,
        names: Sequence[str] = ("",),
        world: World | None = None,
    ) -> None:
        self.tasks, self.count, self.steps = tasks, count, steps
        self.names, self.world = list(names), world or World()
        self.filters = filters(chosen or {})
        self.budget = budget_of(count, oversample or OversampleConfig(), self.filters)
        self.scheduler, self.buffer = Scheduler(count, max_staleness), RolloutBuffer()
        self.owed: list[int] = []
        """Environments whose groups did not pass: the next tasks are theirs, so that each keeps its weight."""
        self._spans: dict[int, tuple[float, float]] = {}
        self._again: list[tuple[int, Task]] = []
        self._asked = math.nan
        self._taken: dict[int, Task] = {}

    def collect(self, step: int, player: Player) -> StepBatch:
        """A step's groups, waited for; others begin in their place."""
        began, first = time.monotonic(), self.scheduler.head
        self._taken.clear()
        trained: list[Group] = []
        dropped: list[Group] = []
        for number, task in self._again:  # what was under way when the run was interrupted
            self._begin(number, task, player)
        self._again.clear()
        self._admit(step, player)
        waited = 0.0
        while (missing := self.count - len(trained)) and len(trained) + len(dropped) < self.budget:
            ask = min(missing, self.budget - len(trained) - len(dropped))
            before = time.monotonic()
            ended = self._end(ask, player)
            waited += time.monotonic() - before
            trained += [group for group in ended if group.filtered is None]
            dropped += [group for group in ended if group.filtered is not None]
            left = self.budget - len(trained) - len(dropped)
            self._admit(step, player, missing=min(self.count - len(trained), left), left=left)
        self._admit(step + 1, player)
        played = trained + dropped
        self.tasks.learn(played)
        busy, self._asked = began - self._asked, time.monotonic()
        metrics = self._metrics(trained, dropped)
        metrics |= {"stream/wait": waited, "stream/overlap": busy / (busy + waited)} | staleness(trained, step)
        numbers = range(first, self.scheduler.head)
        spans = [(number, *self._spans.pop(number)) for number in numbers if number in self._spans]
        return StepBatch(trained, [e for group in played for e in group.episodes], dropped, metrics, spans)

    def advance(self, step: int, player: Player) -> None:
        """New weights have reached the engine: more may begin."""
        self._admit(step, player)

    def put_back(self) -> None:
        """The step that was collected could not be played: whoever goes on from here plays it again."""
        for number, task in self._taken.items():
            self.buffer.put(number, Entry(task, None))
        self.scheduler.head -= len(self._taken)

    def save(self, folder: Path) -> None:
        """Writes everything that later steps depend on, groups that wait included; every rank calls it.

        A group none of whose episodes could be played is not kept: a run that a dead server has ended could not go on.
        """
        entries = list(self.buffer)
        waiting = ((number, entry.whole) for number, entry in entries)
        mine = {number: group for number, group in waiting if group is not None and not fails(group)}
        shared = share_groups(self.world, mine, "saving")
        whole = {number: encoded(self.world, group) for number, group in shared.items()}
        if self.world.rank != 0:
            return
        under_way = [{"number": n, "task": asdict(entry.task), "group": whole.get(n)} for n, entry in entries]
        state = {"envs": self.names, "tasks": self.tasks.state_dict(), "head": self.scheduler.head, "owed": self.owed}
        (folder / STATE).write_text(json.dumps({**state, "stream": under_way}), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Goes on where `save` was called: what was under way is played again, with the same seeds.

        Raises:
            CheckpointError: it cannot be read, or is of other environments or another curriculum.
        """
        go_on(folder, self.names, self._load)

    def close(self) -> None:
        """Gives up what is under way."""
        self.buffer.cancel()

    # Inside

    def _admit(self, step: int, player: Player, missing: int | None = None, left: int | None = None) -> None:
        """Begins what may begin before that step has taken `missing` numbers at least, `left` at most."""
        needed = self.budget * (self.steps - step - 1) + (self.budget if left is None else left)
        for number in self.scheduler.begin(step, player.version, missing=missing, needed=needed):
            place = number % self.count
            if place == 0:
                self.tasks.begin(number // self.count)
            env = self.owed.pop(0) if self.owed else self.tasks.slots(1)[0]
            (task,) = self.tasks.draw([env])
            self._begin(number, task, player)

    def _begin(self, number: int, task: Task, player: Player) -> None:
        future = player.begin(task) if number % self.world.size == self.world.rank else None
        self.buffer.put(number, Entry(task, future))
        if future is not None:
            began = time.perf_counter()
            future.add_done_callback(lambda _: self._spans.update({number: (began, time.perf_counter())}))

    def _end(self, count: int, player: Player) -> list[Group]:
        """The next groups, judged, in the order of their numbers; those of other ranks as outlines."""
        first = self.scheduler.head
        taken = {number: self.buffer.take(number) for number in range(first, first + count)}
        self._taken |= {number: entry.task for number, entry in taken.items()}
        futures = {number: entry.group for number, entry in taken.items() if entry.group is not None}
        mine = dict(zip(futures, player.wait(list(futures.values())), strict=True))
        shared = share_groups(self.world, {n: judged(group, self.filters) for n, group in mine.items()}, "rollout")
        self.scheduler.end(count)
        self.owed += [group.task.env for group in shared.values() if group.filtered is not None]
        return list(shared.values())

    def _load(self, state: Mapping[str, Any]) -> None:
        self.tasks.load_state_dict(state["tasks"])
        self.owed = list(state["owed"])
        head, entries = state["head"], state["stream"]
        self.scheduler.head, self.scheduler.cursor = head, head + len(entries)
        begun = [Task(**entry["task"]) for entry in entries]
        step, drawn = divmod(self.scheduler.cursor, self.count)
        self.tasks.begin(step, drawn, begun[max(0, len(begun) - drawn) :])
        for entry, task in zip(entries, begun, strict=True):
            number = entry["number"]
            if entry["group"] is None:
                self._again.append((number, task))
            else:
                self.buffer.put(number, Entry(task, self._restored(number, task, entry["group"])))

    def _restored(self, number: int, task: Task, episodes: Iterable[Mapping[str, Any]]) -> Future[Group] | None:
        """A group that waited: here, if this rank is the one whose number it is."""
        owner = number % self.world.size
        group = Group(task, tuple(replace(decode(data), rank=owner) for data in episodes))
        future: Future[Group] = Future()
        future.set_result(own_groups(self.world, [group])[0])
        return future if owner == self.world.rank else None

    def _metrics(self, trained: Sequence[Group], dropped: Sequence[Group]) -> dict[str, float]:
        """Where the step's groups went, and what waits."""
        played = [*trained, *dropped]
        seconds = [max(e.seconds for e in group.episodes) for group in played]
        slow = [s for s in seconds if s > STRAGGLES * float(np.median(seconds))]
        waiting = [entry.whole for _, entry in self.buffer if entry.whole is not None]
        return where_groups_went(self.filters, len(trained), played) | {
            "groups/failed": float(sum(map(fails, played))),
            "stream/ended": float(self.scheduler.head),
            "stream/buffer": float(self.buffer.waiting),
            "stream/under_way": float(self.buffer.under_way),
            "stream/stragglers": len(slow) / len(seconds) if seconds else math.nan,
            "stream/straggler_seconds": float(np.mean(slow)) if slow else math.nan,
            "stream/length_trained": length(trained),
            "stream/length_finished": length([*played, *waiting]),
        }


def staleness(groups: Sequence[Group], step: int) -> dict[str, float]:
    """How many updates old the tokens are that step `step` trains on, by each token's own version."""
    spans = [span for group in groups for episode in group.episodes for _, span in episode.spans]
    ages = step - np.concatenate([np.zeros(0, np.int32), *(span.versions for span in spans)])
    if not len(ages):
        return {"stream/staleness_mean": math.nan, "stream/staleness_max": math.nan}
    return {"stream/staleness_mean": float(ages.mean()), "stream/staleness_max": float(ages.max())}


def fails(group: Group) -> bool:
    """Whether none of its episodes could be played."""
    return all(episode.stop_reason.failed for episode in group.episodes)


def length(groups: Sequence[Group]) -> float:
    """Sampled tokens of an episode, on average."""
    tokens = [episode.tokens_generated for group in groups for episode in group.episodes]
    return float(np.mean(tokens)) if tokens else math.nan
