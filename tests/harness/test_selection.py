"""Filters and over-sampling: every slot filled where it can be, nothing counted twice, everything survives a kill."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import group_of

from llm_gym.core import Completion, Group, StopReason, Task
from llm_gym.episode_files import encode
from llm_gym.errors import CheckpointError, ConfigError
from llm_gym.harness.data.filters import FILTERS, filters
from llm_gym.harness.data.selection import OversampleConfig, Selection
from llm_gym.harness.data.tasks import Tasks
from llm_gym.trajectories import trajectories

nan = float("nan")


@pytest.mark.parametrize(
    ("name", "limit", "rewards", "passes"),
    [
        ("spread", 0, (1, 1, 1), False),
        ("spread", 0, (1, 1, 1 + 1e-12), True),
        ("spread", 0.5, (0, 0.5), False),
        ("spread", 0, (1, nan, nan), False),
        ("spread", 0, (1, nan, 0), True),
        ("spread", 0, (nan, nan), False),
        ("min_reward", 0.5, (1, 0), True),
        ("min_reward", 0.5, (1, 0, nan), True),
        ("min_reward", 0.5, (1, 0, 0), False),
        ("max_reward", 0.5, (1, 0), True),
        ("max_reward", 0.5, (1, 0.1), False),
        ("max_reward", 0.5, (nan, nan), False),
        ("min_reward", 0.0, (nan, nan), False),
        ("sound", 2, (1, nan, 0), True),
        ("sound", 3, (1, nan, 0), False),
        ("distinct", 3, (1, 1, 1), True),
        ("distinct", 3, (1, 1, nan), False),
    ],
)
def test_closed_forms(name: str, limit: float, rewards: tuple[float, ...], passes: bool) -> None:
    assert FILTERS[name](group_of(*rewards), limit) is passes


def spoken(*lengths: int) -> Group:
    """Episodes that said so many equal tokens."""
    group = group_of(*[1.0] * len(lengths))
    completions = [Completion(np.full(n, 9, np.int32), np.zeros(n, np.float32), "stop") for n in lengths]
    return Group(
        Task(0, 0),
        tuple(
            dataclasses.replace(e, trajectories=trajectories([dataclasses.replace(e.turns[0], completion=c)]))
            for e, c in zip(group.episodes, completions, strict=True)
        ),
    )


def test_lengths_and_distinct_completions() -> None:
    group = spoken(2, 2, 8)
    assert FILTERS["min_length"](group, 4)
    assert not FILTERS["min_length"](group, 4.1)
    assert FILTERS["max_length"](group, 4)
    assert not FILTERS["max_length"](group, 3.9)
    assert FILTERS["distinct"](group, 2)
    assert not FILTERS["distinct"](group, 3)


def even_seed(group: Group, limit: object) -> bool:
    return group.seed % 2 == limit


def test_filters_compose_and_take_a_users_own() -> None:
    made = filters({"spread": 0, f"{__name__}:even_seed": 0})
    for seed, rewards, wanted in ((2, (0, 1), [True, True]), (3, (0, 0), [False, False])):
        assert [passes(group_of(*rewards, seed=seed)) for passes in made.values()] == wanted


@pytest.mark.parametrize(
    ("chosen", "oversample", "said"),
    [
        ({"spraed": 0}, {}, "filters: unknown value 'spraed'; did you mean 'spread'"),
        ({"spread": None}, {}, "filters.spread: got None, want a number"),
        ({"spread": True}, {}, "filters.spread: got True"),
        ({}, {"max_factor": 2}, "oversample.max_factor: there are no filters"),
        ({"spread": 0}, {"max_factor": 0.5}, "oversample.max_factor: got 0.5"),
        ({"spread": 0}, {"max_age": 2}, "oversample.max_age: it is no setting any more: groups that passed"),
    ],
)
def test_refusals(chosen: dict, oversample: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Selection(Tasks(0), 4, chosen, OversampleConfig(**oversample))


class Player:
    """Plays tasks; a group has spread if its seed says so. Keeps a book of what was played."""

    def __init__(self, share: float) -> None:
        self.share, self.played = share, list[Task]()

    def play(self, tasks: list[Task]) -> list[Group]:
        self.played += tasks
        return [self.group(task) for task in tasks]

    def group(self, task: Task) -> Group:
        passes = task.seed / 2**32 < self.share
        return dataclasses.replace(group_of(0, 1 if passes else 0, seed=task.seed, env=f"env{task.env}"), task=task)


def select(count: int = 8, weights: tuple[float, ...] = (1.0,), factor: float = 4.0) -> Selection:
    tasks = Tasks(11, weights, [None] * len(weights), [1.0] * len(weights))
    names = [f"env{i}" for i in range(len(weights))]
    return Selection(tasks, count, {"spread": 0}, OversampleConfig(factor), names)


def test_without_filters_a_step_trains_on_what_it_plays() -> None:
    player = Player(0.0)
    for step in range(3):
        one = Selection(Tasks(11), 8)
        found = one.collect(step, player)
        assert [g.seed for g in found.groups] == [task.seed for task in player.played[-8:]]
        assert found.metrics == {"groups/trained": 8, "groups/zero_spread": 1.0, "groups/played": 8}
        assert found.episodes == found.played


@settings(max_examples=60)
@given(
    share=st.floats(0, 1),
    count=st.integers(1, 12),
    weights=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=1, max_size=3).map(tuple),
    factor=st.floats(1, 6),
)
def test_nothing_is_lost_and_nothing_is_counted_twice(
    share: float, count: int, weights: tuple[float, ...], factor: float
) -> None:
    player, chosen = Player(share), select(count, weights, factor)
    waiting: Counter[int] = Counter()
    trained: list[int] = []
    for step in range(6):
        first = len(player.played)
        found = chosen.collect(step, player)
        fresh = [task.seed for task in player.played[first:]]
        m = found.metrics
        assert len(fresh) <= max(count, int(count * factor))
        assert Counter(e.seed for e in found.played) == Counter(dict.fromkeys(fresh, 2))
        assert m["groups/played"] == len(fresh)
        assert m["groups/trained"] == len(found.groups) <= count
        assert m["groups/dropped/spread"] == len(found.dropped)
        assert all(g.rewards.max() > g.rewards.min() for g in found.groups)
        trained += [g.seed for g in found.groups]
        before = sum(waiting.values())
        waiting = Counter(g.seed for own in chosen.kept for _, g in own)
        gone = len(found.groups) + len(found.dropped) + m.get("groups/expired", 0) + sum(waiting.values())
        assert len(fresh) + before == gone
        assert all(born == step for own in chosen.kept for born, _ in own)
        if len(found.groups) < count:  # then the bound was reached
            assert len(fresh) == int(count * factor)
    assert len(set(trained)) == len(trained)
    assert len({task.seed for task in player.played}) == len(player.played)


def test_a_mixture_keeps_its_shares_when_one_environment_passes_less() -> None:
    class Uneven(Player):
        def group(self, task: Task) -> Group:
            self.share = (0.9, 0.3)[task.env]
            return super().group(task)

    player, chosen = Uneven(0), select(8, (3.0, 1.0), factor=10)
    for step in range(8):
        envs = [g.episodes[0].env_id for g in chosen.collect(step, player).groups]
        assert envs.count("env0") == 6
        assert envs.count("env1") == 2
    assert sum(task.env for task in player.played) > len(player.played) / 4


def test_left_overs_are_used_first_and_are_one_step_old() -> None:
    player, chosen = Player(0.5), select(8)
    for step in range(10):
        left = [g.seed for own in chosen.kept for _, g in own]
        found = chosen.collect(step, player)
        assert [g.seed for g in found.groups][: len(left)] == left
        assert found.metrics["groups/reused"] == len(left)
        assert found.metrics["groups/kept"] == sum(map(len, chosen.kept))
    assert player.played
    assert left


def test_off_means_one_round_and_nothing_kept() -> None:
    player, chosen = Player(0.5), select(8, factor=1)
    for step in range(5):
        found = chosen.collect(step, player)
        assert len(found.played) == 16
        assert not any(chosen.kept)
        assert len(found.groups) + len(found.dropped) == 8


def test_everything_filtered_is_an_empty_harvest_at_the_bound() -> None:
    found = select(4, factor=2.5).collect(0, Player(0))
    assert found.groups == found.episodes == []
    assert len(found.played) == 20
    assert found.metrics["groups/zero_spread"] == 1


@pytest.mark.parametrize("moment", [1, 4])
def test_a_saved_selection_goes_on_exactly(tmp_path: Path, moment: int) -> None:
    one, other = Player(0.4), Player(0.4)
    whole, again = select(6, (2.0, 1.0)), select(6, (2.0, 1.0))
    for step in range(8):
        found = whole.collect(step, one)
        if step == moment:
            whole.save(tmp_path)
            again.restore(tmp_path)
            assert any(again.kept)
        elif step > moment:
            same = again.collect(step, other)
            assert same.metrics == found.metrics
            assert [encode(e) for e in same.episodes] == [encode(e) for e in found.episodes]


def test_a_checkpoint_of_other_environments_is_refused(tmp_path: Path) -> None:
    select(6, (2.0, 1.0)).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"data\.json.*env1.*the run of \['env0'\]"):
        select(6).restore(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be used"):
        select(6).restore(tmp_path / "nowhere")


def test_failed_episodes_stay_in_their_group() -> None:
    group = group_of(0, nan, 1)
    player = Player(1.0)
    player.group = lambda task: group
    found = Selection(Tasks(0), 1, {"spread": 0}).collect(0, player)
    assert found.groups == [group]
    assert [e.stop_reason for e in found.episodes].count(StopReason.ENV_ERROR) == 1
