"""Curricula: each row once an epoch, rows near the target first, and state that goes on exactly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.errors import ConfigError
from llm_gym.harness.data.curriculum import CurriculumConfig, Difficulty, Epochs, curriculum

CONFIG = CurriculumConfig()


@given(st.integers(1, 30), st.lists(st.integers(0, 12), max_size=12))
def test_every_row_is_played_once_an_epoch(rows: int, counts: list[int]) -> None:
    epochs = Epochs(rows, (7,), CONFIG)
    drawn = [row for count in counts for row in epochs.draw(count)]
    assert len(drawn) == sum(counts)
    for start in range(0, len(drawn) - rows + 1, rows):
        assert sorted(drawn[start : start + rows]) == list(range(rows))
    assert len(set(drawn[len(drawn) // rows * rows :])) == len(drawn) % rows


def test_epochs_are_shuffled_by_seed_and_epoch() -> None:
    orders = [Epochs(50, seed, CONFIG).order(epoch).tolist() for seed in ((1,), (2,)) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert Epochs(50, (2,), CONFIG).draw(50) == orders[2]


def test_pass_rates_in_closed_form() -> None:
    """Prior Beta(2t, 2 - 2t); a second visit weighs the first by `memory`."""
    rows = Difficulty(3, (0,), CurriculumConfig(target=0.25, memory=0.5))
    rows.learn(1, 6, 2)
    rows.learn(1, 0, 8)
    rows.learn(2, 0, 0)
    np.testing.assert_allclose(rows.rates(), [0.25, (0.5 + 3) / (2 + 3 + 9), 0.25])


def test_probabilities_in_closed_form() -> None:
    rows = Difficulty(3, (0,), CurriculumConfig(explore=0.2))
    rows.learn(0, 8, 0)
    rows.learn(1, 4, 4)
    weights = np.array([0.9 * 0.1, 0.25, 0.25])
    np.testing.assert_allclose(rows.probabilities(), 0.8 * weights / weights.sum() + 0.2 / 3)


@given(st.floats(0.05, 0.95))
def test_no_row_is_likelier_than_one_at_the_target(target: float) -> None:
    rows = Difficulty(101, (0,), CurriculumConfig(target=target, explore=0.0))
    rows.passed[1:] = np.linspace(0, 50, 100)
    rows.failed[1:] = 50 - np.linspace(0, 50, 100)
    chances = rows.probabilities()
    assert chances[0] >= chances.max() - 1e-15  # row 0 was never played
    assert chances.min() > 0


def test_draws_follow_the_probabilities() -> None:
    """First rows of 20,000 draws against the exact probabilities: within five standard deviations."""
    rows = Difficulty(5, (1,), CONFIG)
    for row, passed in enumerate([0, 2, 4, 8]):
        rows.learn(row, passed, 8 - passed)
    n = 20_000
    counts = np.bincount([rows.draw(1)[0] for _ in range(n)], minlength=5)
    p = rows.probabilities()
    assert (np.abs(counts - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


@given(st.integers(1, 12), st.integers(0, 40), st.sets(st.integers(0, 11)))
def test_no_row_twice_before_all_were_drawn(rows: int, count: int, avoid: set[int]) -> None:
    avoid = {row for row in avoid if row < rows}
    drawn = Difficulty(rows, (3,), CONFIG).draw(count, avoid)
    assert len(drawn) == count
    free = rows - len(avoid) or rows
    assert len(set(drawn[:free])) == min(count, free)
    assert len(avoid) == rows or not avoid & set(drawn[:free])
    assert sorted(drawn[free : free + rows]) == sorted(set(drawn[free : free + rows]))


@pytest.mark.parametrize("kind", [Epochs, Difficulty])
def test_state_goes_on_exactly(kind: type[Epochs | Difficulty]) -> None:
    one, two = kind(40, (5, 0), CONFIG), kind(40, (5, 0), CONFIG)
    for step in range(9):
        for row in one.draw(7):
            one.learn(row, row % 9, 8 - row % 9)
        if step == 4:
            two.load_state_dict(json.loads(json.dumps(one.state_dict())))
        elif step > 4:
            for row in two.draw(7):
                two.learn(row, row % 9, 8 - row % 9)
            assert two.state_dict() == one.state_dict()


def reversed_rows(rows: int, seed: tuple[int, ...], config: CurriculumConfig) -> Epochs:
    """A user's own."""
    made = Epochs(rows, seed, config)
    made.order = lambda epoch: np.arange(rows)[::-1]  # type: ignore[method-assign]
    return made


def test_a_curriculum_of_ones_own() -> None:
    made = curriculum(CurriculumConfig(name=f"{__name__}:reversed_rows"), "e", 4, (0,))
    assert made is not None
    assert made.draw(5) == [3, 2, 1, 0, 3]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"name": "epoch"}, "curriculum.name: unknown value 'epoch'; did you mean 'epochs'"),
        ({"name": "epochs"}, "curriculum.name: got 'epochs', but Sums-v0 has no rows to choose from"),
        ({"target": 1.0}, "curriculum.target: got 1.0"),
        ({"memory": 1.5}, "curriculum.memory: got 1.5"),
    ],
)
def test_refusals(given_: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        curriculum(CurriculumConfig(**given_), "Sums-v0", None, (0,))


@pytest.mark.parametrize("kind", [Epochs, Difficulty])
@pytest.mark.parametrize("rows", [3, 12])
def test_other_data_than_the_run_began_with_is_refused(kind: type[Epochs] | type[Difficulty], rows: int) -> None:
    """Of fewer rows the state was once read past their end, of more it counted others."""
    begun = kind(6, (0,), CONFIG)
    begun.draw(6)
    for row in range(6):
        begun.learn(row, 1, 0)
    with pytest.raises(ValueError, match=f"it is of 6 rows, the data has {rows}"):
        kind(rows, (0,), CONFIG).load_state_dict(begun.state_dict())


def test_a_state_without_the_number_of_rows_is_of_an_older_version() -> None:
    """It goes on, unless it knows of rows that are not there."""
    old = {"drawn": 6, "results": [[5, 1.0, 0.0]]}
    Difficulty(6, (0,), CONFIG).load_state_dict(old)
    Epochs(6, (0,), CONFIG).load_state_dict({"drawn": 6})
    with pytest.raises(ValueError, match="it is of at least 6 rows"):
        Difficulty(5, (0,), CONFIG).load_state_dict(old)
