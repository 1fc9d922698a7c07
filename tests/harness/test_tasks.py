"""What groups play: seeds, shares of environments, rows."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Completion, Episode, Group, StopReason, Task, Turn
from llm_gym.harness.data.curriculum import CurriculumConfig, Difficulty, Epochs
from llm_gym.harness.data.tasks import Dealer, Tasks, task_seeds
from llm_gym.harness.evaluation.evaluator import EVAL_SEED
from llm_gym.trajectories import trajectories


def group_of(*rewards: float, seed: int = 0, env: str = "e", reason: StopReason = StopReason.ANSWERED) -> Group:
    """One episode of one token for each reward; NaN: it failed."""
    made = []
    for member, reward in enumerate(rewards):
        failed = np.isnan(reward)
        completion = Completion(np.array([member + 4], np.int32), np.array([-0.5], np.float32), "stop")
        turn = Turn(np.array([1, 2], np.int32), completion, 0.0 if failed else reward)
        stop = StopReason.ENV_ERROR if failed else reason
        made.append(Episode(env, seed, trajectories([turn]), stop, member=member))
    return Group(Task(0, seed), tuple(made))


def test_training_seeds_and_evaluation_seeds_never_meet() -> None:
    drawn = [task_seeds(0, step, 0, 64) for step in range(50)]
    assert drawn[7] == task_seeds(0, 7, 0, 64)
    assert drawn[7] != task_seeds(1, 7, 0, 64)
    flat = np.concatenate(drawn)
    assert len(set(flat.tolist())) == len(flat)
    assert flat.max() < EVAL_SEED


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40))
def test_a_steps_seeds_do_not_depend_on_how_many_are_drawn_at_a_time(run: int, step: int, one: int, two: int) -> None:
    assert task_seeds(run, step, 0, one) + task_seeds(run, step, one, two) == task_seeds(run, step, 0, one + two)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.lists(st.integers(0, 40), max_size=8))
def test_after_any_number_of_deals_each_has_its_share_to_within_one(weights: list[float], parts: list[int]) -> None:
    """Tijdeman's bound, 1 - 1 / (2k - 2), after every single deal, however many are dealt at a time."""
    dealer, whole = Dealer(weights), Dealer(weights).deal(sum(parts))
    dealt = [i for part in parts for i in dealer.deal(part)]
    assert dealt == whole
    shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    bound = 1 - Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
    for n in range(len(dealt) + 1):
        assert all(abs(dealt[:n].count(i) - share * n) <= bound for i, share in enumerate(shares))


def test_a_step_of_sixteen_has_the_right_shares() -> None:
    dealer = Dealer([2, 1, 1])
    for _ in range(5):
        step = dealer.deal(16)
        assert [step.count(i) for i in range(3)] == [8, 4, 4]
    assert Dealer([2, 1]).deal(6) == [0, 1, 0, 0, 1, 0]


def test_tasks_of_a_mixture_have_seeds_of_their_own_and_rows_where_there_are_some() -> None:
    def new() -> Tasks:
        return Tasks(3, [1, 1], [None, Epochs(5, (3, 1), CurriculumConfig())], [1, 1])

    tasks = new()
    tasks.begin(4)
    drawn = tasks.draw([0, 1, 1, 0]) + tasks.draw([1, 0])
    assert [task.seed for task in drawn] == task_seeds(3, 4, 0, 6)
    assert [task.env for task in drawn] == [0, 1, 1, 0, 1, 0]
    rows = [task.row for task in drawn]
    assert rows == [None, *Epochs(5, (3, 1), CurriculumConfig()).draw(2), None, rows[4], None]
    again = new()
    again.load_state_dict(tasks.state_dict())
    for one in (tasks, again):
        one.begin(5)
    assert again.draw([1, 1]) == tasks.draw([1, 1])


def test_a_step_draws_no_row_twice_and_learns_from_what_did_not_fail() -> None:
    hard = Difficulty(6, (0,), CurriculumConfig())
    tasks = Tasks(0, [1], [hard], [0.5])
    tasks.begin(0)
    drawn = tasks.draw([0] * 3) + tasks.draw([0] * 3)
    assert sorted(task.row for task in drawn if task.row is not None) == list(range(6))
    nan = float("nan")
    groups = [group_of(1, 0, nan, 0.5 - 1e-9), group_of(nan, nan)]
    played = [Task(0, 1, 2), Task(0, 1, 3), Task(0, 1, None)]
    tasks.learn(replace(group, task=task) for task, group in zip(played, [*groups, groups[0]], strict=True))
    assert hard.state_dict()["results"] == [[2, 2.0, 1.0]]
