"""The scheduler: the bound is kept whatever passes, and no number is begun or ended twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.rollouts.scheduler import Scheduler


@given(
    per_step=st.integers(1, 5),
    bound=st.integers(0, 4),
    every=st.integers(1, 5),
    passes=st.lists(st.booleans(), min_size=200, max_size=200),
    budget=st.integers(1, 3),
)
def test_no_task_is_trained_on_later_than_the_bound_allows(
    per_step: int, bound: int, every: int, passes: list[bool], budget: int
) -> None:
    every = min(every, bound + 1)
    scheduler, version, born = Scheduler(per_step, bound), 0, dict[int, int]()
    ended = []

    def begin(step: int, missing: int) -> None:
        for number in scheduler.begin(step, version, missing=missing):
            assert number not in born
            born[number] = version

    for step in range(12):
        begin(step, per_step)
        kept = played = 0
        while kept < per_step and played < budget * per_step:
            assert scheduler.head in born, "the trainer would wait for what may not begin"
            number = scheduler.head
            scheduler.end(1)
            ended.append(number)
            played += 1
            kept += passes[number % len(passes)]
            assert 0 <= step - born[number] <= bound
            begin(step, min(per_step - kept, budget * per_step - played))
        begin(step + 1, per_step)
        if (step + 1) % every == 0:
            version = step + 1
    assert ended == list(range(len(ended)))


def test_as_much_is_under_way_as_the_bound_allows() -> None:
    scheduler = Scheduler(4, 2)
    assert scheduler.begin(0, 0) == range(12)
    scheduler.end(4)
    assert scheduler.begin(1, 0) == range(12, 12)
    assert scheduler.begin(1, 1) == range(12, 16)


def test_nothing_begins_that_no_step_is_left_for() -> None:
    assert Scheduler(4, 2).begin(0, 0, needed=5) == range(5)


def test_what_has_not_begun_cannot_end() -> None:
    scheduler = Scheduler(4, 0)
    scheduler.begin(0, 0)
    with pytest.raises(ValueError, match="number 4 has not begun"):
        scheduler.end(5)
