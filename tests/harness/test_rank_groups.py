"""Groups among ranks: tokens stay where they were played, and every rank decides as one process would."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import in_ranks

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.episode_files import encode
from llm_gym.harness.batching.packing import samples
from llm_gym.harness.batching.shards import pack_shard
from llm_gym.harness.data.selection import OversampleConfig, Selection
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.distributed.groups import own_groups, share_groups, whole_on_rank0
from llm_gym.harness.distributed.world import World
from llm_gym.harness.runs.metrics import describe, staleness
from llm_gym.trajectories import trajectories

TOKENS = 400


def group(task: Task) -> Group:
    """Two episodes, of two turns and a tool's answer; both say the same if the seed is even."""
    episodes = []
    for member in range(2):
        rng = np.random.default_rng([task.seed, member * (task.seed % 2)])
        said = [Completion(rng.integers(0, 99, TOKENS).astype(np.int32), np.zeros(TOKENS, np.float32), "stop", 3)] * 2
        first = np.arange(5, dtype=np.int32)
        second = np.concatenate([first, said[0].tokens, first])
        turns = [Turn(first, said[0], 0.25), Turn(second, said[1], float(member))]
        answer = {"role": "tool", "content": ("Error: no such file" if task.seed % 3 else "12")}
        messages = ({"role": "user", "content": "x" * 1000}, answer)
        made = trajectories(turns)
        episodes.append(Episode("e", task.seed, made, StopReason.ANSWERED, {}, messages, member, task=task.row))
    return Group(task, tuple(episodes))


GROUPS = [group(Task(0, seed)) for seed in range(5)]


class Groups:
    """Plays every task as `group` does."""

    def play(self, tasks: Sequence[Task]) -> list[Group]:
        return [group(task) for task in tasks]

    def close(self) -> None:
        pass


def episodes_of(groups: list[Group]) -> list[Episode]:
    return [episode for each in groups for episode in each.episodes]


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_stay_where_they_were_played(size: int) -> None:
    def work(world: World) -> Any:
        told: list[int] = []
        gather = world.gather
        world.gather = lambda value, what: told.append(len(pickle.dumps(value))) or gather(value, what)  # type: ignore[method-assign, func-returns-value]
        own = {number: GROUPS[number] for number in world.shard(range(5))}
        known = list(share_groups(world, own, "x").values())
        whole = [[e.whole for e in each.episodes] for each in known]
        every = episodes_of(known)
        batch = pack_shard(world, samples(known, np.ones((5, 2))), max_tokens=10**6)
        trained = sorted(token for micro in batch.micro for token in micro.streams["target"].tolist())
        on_file = [encode(e) for e in whole_on_rank0(world, every, "x")]
        read = own_groups(world, GROUPS if world.rank else known)
        said = describe(every), staleness(every, 5), [g.rewards.tolist() for g in known]
        return whole, said, (batch.tokens, trained), on_file, told[0], len(read)

    found = in_ranks(size, work)
    (alone,) = in_ranks(1, work)
    for rank, (whole, said, batch, on_file, told, _) in enumerate(found):
        assert whole == [[number % size == rank] * 2 for number in range(5)]
        assert said == alone[1]
        assert batch[0] == alone[2][0] == 5 * 2 * 2 * TOKENS
        assert told < 0.5 * 2 * 2 * TOKENS * len(GROUPS[rank::size])  # less than half a byte a token
        assert len(on_file) == (10 if rank == 0 else 0)
    assert sorted(token for _, _, (_, trained), *_ in found for token in trained) == alone[2][1]
    assert [{**e, "rank": 0} for e in found[0][3]] == alone[3]
    assert [e["rank"] for e in found[0][3]] == [number % size for number in range(5) for _ in range(2)]


def test_a_file_is_dealt_as_it_was_played() -> None:
    def work(world: World) -> list[list[bool]]:
        played = [replace(g, episodes=tuple(replace(e, rank=g.seed % 3) for e in g.episodes)) for g in GROUPS]
        return [[e.whole for e in each.episodes] for each in own_groups(world, played)]

    assert in_ranks(1, work) == [[[True] * 2] * 5]
    assert in_ranks(3, work) == [[[number % 3 == rank] * 2 for number in range(5)] for rank in range(3)]
    first, second = in_ranks(2, work)
    assert first == [[True] * 2, [False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert [[not a for a in each] for each in first] == second


def test_ranks_choose_the_groups_of_one_process(tmp_path: Path) -> None:
    """By a filter that reads tokens, which one rank alone has; left-overs survive a checkpoint, on their ranks."""

    def work(world: World) -> Any:
        def made() -> Selection:
            chosen = {"distinct": 2}
            return Selection(Tasks(11), 3, chosen, OversampleConfig(6.0), world=world)

        first, found = made(), []
        for step in range(6):
            batch = first.collect(step, Groups())
            trained = [encode(e) | {"rank": 0} for e in whole_on_rank0(world, batch.episodes, "x")]
            kept = [(born, g.seed) for own in first.kept for born, g in own]
            found.append((batch.metrics, [g.seed for g in batch.groups], trained, kept))
            folder = tmp_path / f"{world.size}-{step}"
            if world.rank == 0:
                folder.mkdir()
            world.meet("x")
            first.save(folder)
            world.meet("x")
            again = made()
            again.restore(folder)
            assert [e.whole for own in again.kept for _, g in own for e in g.episodes] == [
                e.rank == world.rank for own in first.kept for _, g in own for e in g.episodes
            ]
            first = again
        return found

    (alone,) = in_ranks(1, work)
    both = in_ranks(2, work)
    assert any(kept for *_, kept in alone)
    assert both[0] == alone
    assert [step[:2] for step in both[1]] == [step[:2] for step in alone]
