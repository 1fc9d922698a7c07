"""Groups played ahead: each number ends once and in its order, whatever is slow, filtered or interrupted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import in_ranks

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.errors import CheckpointError, ConfigError
from llm_gym.harness import TrainConfig
from llm_gym.harness.data.curriculum import CurriculumConfig, Difficulty
from llm_gym.harness.data.selection import OversampleConfig, StepBatch
from llm_gym.harness.data.stream import Stream, StreamConfig
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.distributed.world import World
from llm_gym.trajectories import trajectories


class Slow:
    """A player whose groups become whole when somebody waits for them, or now and then before, in any order."""

    def __init__(self, seed: int = 0) -> None:
        self.version, self.begun = 0, list[Task]()
        self._open: dict[int, tuple[Task, int, Future[Group]]] = {}
        self._random = random.Random(seed)

    def begin(self, task: Task) -> Future[Group]:
        future: Future[Group] = Future()
        self.begun.append(task)
        self._open[id(future)] = task, self.version, future
        return future

    def wait(self, begun: Sequence[Future[Group]]) -> list[Group]:
        early = [key for key in self._open if self._random.random() < 0.3]
        for key in {*early, *(id(future) for future in begun)} & self._open.keys():
            task, born, future = self._open.pop(key)
            future.set_result(self._group(task, born))
        return [future.result() for future in begun]

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        raise AssertionError("nothing is waited for as it begins")

    def close(self) -> None:
        pass

    def _group(self, task: Task, born: int) -> Group:
        """Two episodes of three tokens, the last of which came after an update, if there was one meanwhile."""
        updates = ((2, self.version),) if self.version > born else ()
        episodes = []
        for member in range(2):
            reward = float(member if task.seed % 3 else 1)  # a third has no spread
            tokens, logprobs = np.array([4, 5, member], np.int32), np.zeros(3, np.float32)
            turn = Turn(np.array([1, 2], np.int32), Completion(tokens, logprobs, "stop", born, updates), reward)
            made = trajectories([turn])
            episodes.append(Episode("e", task.seed, made, StopReason.ANSWERED, member=member, task=task.row))
        return Group(task, tuple(episodes))


class Picky(Slow):
    """Of the first environment two groups of three have no spread, of the others every one has."""

    def _group(self, task: Task, born: int) -> Group:
        made = super()._group(replace(task, seed=1), born)
        flat = task.env == 0 and task.seed % 3
        episodes = made.episodes[:1] * 2 if flat else made.episodes
        return Group(task, tuple(replace(episode, seed=task.seed) for episode in episodes))


def stream(bound: int, *, steps: int = 12, count: int = 4, world: World | None = None, **options: Any) -> Stream:
    return Stream(Tasks(7), count, bound, steps, world=world, **options)


def train(made: Stream, player: Slow, steps: range) -> list[StepBatch]:
    """Steps, as a trainer makes them, with new weights after each."""
    batches = []
    for step in steps:
        batches.append(made.collect(step, player))
        player.version = step + 1
        made.advance(step + 1, player)
    return batches


def seeds(batches: Sequence[StepBatch]) -> list[int]:
    return [group.seed for batch in batches for group in [*batch.groups, *batch.dropped]]


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_no_token_is_older_than_the_bound_and_nothing_is_dropped(bound: int) -> None:
    made, player = stream(bound), Slow()
    batches = train(made, player, range(12))
    assert seeds(batches) == [task.seed for task in player.begun]  # in the order of numbers, each once
    assert len(player.begun) == 12 * 4
    assert max(batch.metrics["stream/staleness_max"] for batch in batches) == bound
    assert batches[-1].metrics["stream/ended"] == 48
    assert len(list(made.buffer)) == 0


def test_the_tasks_are_those_of_the_steps_of_a_run_that_waits() -> None:
    player, tasks = Slow(), Tasks(7)
    train(stream(2), player, range(12))
    for step in range(12):
        tasks.begin(step)
        assert tasks.draw(tasks.slots(4)) == player.begun[4 * step : 4 * step + 4]


def test_age_is_that_of_each_token() -> None:
    made, player = stream(1), Slow()
    batches = train(made, player, range(4))
    for step, batch in enumerate(batches):
        spans = [span for episode in batch.episodes for _, span in episode.spans]
        ages = [
            step - (span.updates[0][1] if span.updates and i == 2 else span.version) for span in spans for i in range(3)
        ]
        assert batch.metrics["stream/staleness_mean"] == np.mean(ages)


def test_filtered_groups_are_replaced_and_end_as_filtered() -> None:
    made, player = stream(2, chosen={"spread": 0}, oversample=OversampleConfig(6.0)), Slow()
    batches = train(made, player, range(12))
    assert [len(batch.groups) for batch in batches] == [4] * 12
    assert {group.filtered for batch in batches for group in batch.dropped} == {"spread"}
    assert sorted(seeds(batches)) == sorted(task.seed for task in player.begun[: len(seeds(batches))])
    assert max(batch.metrics["stream/staleness_max"] for batch in batches) <= 2
    assert all(group.seed % 3 for batch in batches for group in batch.groups)


def test_without_oversampling_a_step_trains_on_fewer() -> None:
    made, player = stream(1, chosen={"spread": 0}), Slow()
    batches = train(made, player, range(12))
    assert sum(len(batch.groups) for batch in batches) < 48
    assert len(seeds(batches)) == 48


def test_each_environment_keeps_its_weight_among_what_is_trained_on() -> None:
    tasks = Tasks(7, weights=(3.0, 1.0), curricula=(None, None), pass_rewards=(1.0, 1.0))
    made = Stream(tasks, 4, 2, 40, {"spread": 0}, OversampleConfig(8.0), names=("a", "b"))
    batches = train(made, Picky(), range(40))
    trained = [group.task.env for batch in batches for group in batch.groups]
    assert len(trained) == 160
    assert abs(trained.count(0) - 120) <= 2 * 4


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_run_that_goes_on_ends_every_number_once(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"chosen": {"spread": 0}, "oversample": OversampleConfig(6.0)}
    whole = seeds(train(stream(2, **options), Slow(1), range(12)))
    first = stream(2, **options)
    before = train(first, Slow(2), range(stop))
    waiting = {number: entry.whole for number, entry in first.buffer}
    first.save(tmp_path)
    first.close()
    second, player = stream(2, **options), Slow(3)
    player.version = stop
    second.restore(tmp_path)
    kept = {number: entry.whole for number, entry in second.buffer}
    assert kept.keys() == {number for number, group in waiting.items() if group is not None}
    assert all(kept[n].rewards.tolist() == waiting[n].rewards.tolist() for n in kept)  # type: ignore[union-attr]
    after = train(second, player, range(stop, 12))
    assert seeds(before) + seeds(after) == whole
    assert max(batch.metrics["stream/staleness_max"] for batch in after) <= 2


@pytest.mark.parametrize("stop", range(1, 11))
def test_a_run_that_goes_on_draws_no_row_twice_in_a_step(tmp_path: Path, stop: int) -> None:
    """With groups replaced a checkpoint may lie in the middle of a step's numbers, some rows of which are drawn."""

    def made() -> Stream:
        tasks = Tasks(7, curricula=(Difficulty(7, (7,), CurriculumConfig()),))
        return Stream(tasks, 5, 3, 12, {"spread": 0}, OversampleConfig(6.0))

    whole = Slow(1)
    train(made(), whole, range(12))
    first, before = made(), Slow(2)
    train(first, before, range(stop))
    first.save(tmp_path)
    second, after = made(), Slow(3)
    after.version = stop
    second.restore(tmp_path)
    train(second, after, range(stop, 12))
    begun = [task for task in after.begun if task not in before.begun]
    assert [*before.begun, *begun] == whole.begun


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    made = stream(1)
    train(made, Slow(), range(1))
    made.save(tmp_path)
    with pytest.raises(CheckpointError, match="of the environments"):
        stream(1, names=("other",)).restore(tmp_path)


def test_ranks_train_on_what_one_process_would(tmp_path: Path) -> None:
    """Tokens on their own ranks, numbers everywhere; what waits survives a checkpoint with another number of ranks."""
    options: dict[str, Any] = {"chosen": {"spread": 0}, "oversample": OversampleConfig(6.0)}

    def work(world: World) -> Any:
        made, player = stream(2, world=world, **options), Slow(world.rank)
        before = train(made, player, range(3))
        made.save(tmp_path)
        whole = [[e.whole for e in group.episodes] for batch in before for group in batch.groups]
        return seeds(before), whole, len(player.begun)

    alone = seeds(train(stream(2, **options), Slow(9), range(12)))
    found = in_ranks(3, work)
    for told, whole, _ in found:
        assert told == alone[: len(told)]
        assert len(whole) == 12
    assert [sum(rank[1][i][0] for rank in found) for i in range(12)] == [1] * 12
    assert max(begun for *_, begun in found) < len(alone) / 2

    def go_on(world: World) -> Any:
        made, player = stream(2, world=world, **options), Slow(world.rank)
        player.version = 3
        made.restore(tmp_path)
        batches = train(made, player, range(3, 12))
        return seeds(batches), [group.episodes[0].whole for batch in batches for group in batch.groups]

    again = in_ranks(2, go_on)
    for told, _ in again:
        assert found[0][0] + told == alone
    assert [sum(flags) for flags in zip(*(whole for _, whole in again), strict=True)] == [1] * len(again[0][1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stream": {"max_staleness": -1}}, "stream.max_staleness: got -1"),
        ({"stream": {"sync_every": 2}}, "stream.sync_every: got 2, which makes tokens 1 updates old"),
        ({"stream": {"max_stale": 1}}, "max_staleness"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)


def test_a_wider_interval_needs_a_wider_bound() -> None:
    assert StreamConfig(max_staleness=2, sync_every=3).sync_every == 3
    assert replace(StreamConfig(), max_staleness=1).sync_every == 1
