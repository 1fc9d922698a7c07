"""The simulation of `benchmarks/scale_sim.py` where its outcome can be said beforehand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from scale_sim import Load, simulate


def load(**more: Any) -> Load:
    """Episodes that are all alike, and nothing that is scarce."""
    alike = {"groups": [[1.0]], "episodes": 240, "seconds": 10.0, "turns": 5, "cost": 0.0, "learner": 0.01}
    return Load(**(alike | more))


def test_where_nothing_is_scarce_everything_is_played() -> None:
    share, rate, busy, step, waits = simulate(load(), 2, 1)
    assert (share, rate) == (pytest.approx(1.0, abs=0.05), pytest.approx(120.0, rel=0.05))
    assert (busy, step) == (0.0, pytest.approx(10 / 3, rel=0.05))
    assert waits == pytest.approx(0.99, abs=0.02)


def test_a_driver_makes_no_more_than_it_can() -> None:
    for drivers in (1, 2):
        _, rate, busy, _, _ = simulate(load(cost=0.1), 2, drivers)
        assert rate == pytest.approx(10 * drivers, rel=0.05)
        assert busy == pytest.approx(1.0, abs=0.05)


def test_a_slow_learner_never_waits() -> None:
    _, rate, _, step, waits = simulate(load(learner=3.0), 1, 1)
    assert (step, waits) == (pytest.approx(15.0), pytest.approx(0.0, abs=1e-9))
    assert rate == pytest.approx(120 * 5 / 15)


def test_groups_that_are_whole_wait_for_the_slowest_of_their_step() -> None:
    """Nothing is left out: what is admitted is played for a share of the time that the spread decides."""
    share, *_ = simulate(load(episodes=960, groups=[[0.5], [0.5], [0.5], [2.5]]), 2, 1)
    assert share == pytest.approx(1 / 2.5, abs=0.05)
