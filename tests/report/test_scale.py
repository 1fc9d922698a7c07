from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.report.charts import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, chart
from llm_gym.report.run import Series
from llm_gym.report.scale import labels, smooth, ticks

numbers = st.floats(-1e12, 1e12, allow_nan=False)


@given(numbers, st.floats(1e-6, 1e12))
def test_ticks_enclose_and_are_round(low: float, size: float) -> None:
    high = low + size
    marks = ticks(low, high)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        assert len(marks) == 3
        return
    step = marks[1] - marks[0]
    assert marks[0] <= low + 1e-6 * step
    assert marks[-1] >= high - 1e-6 * step
    assert 3 <= len(marks) <= 9
    assert np.allclose(np.diff(marks), step, rtol=1e-4)
    assert any(math.isclose(step / 10 ** math.floor(math.log10(step) + 1e-6), r, rel_tol=1e-3) for r in (1, 2, 5))
    assert len(set(labels(marks))) == len(marks)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    smoothed = smooth(values)
    assert len(smoothed) == len(values)
    assert min(values) - 1e-6 <= min(smoothed)
    assert max(smoothed) <= max(values) + 1e-6


def test_smoothing_is_the_normalised_kernel() -> None:
    weights = np.exp(-0.5 * (np.arange(5) - 1.0) ** 2)
    assert smooth([0, 0, 0, 0, 7], 1.0)[1] == pytest.approx(7 * weights[4] / weights.sum())


@given(st.lists(st.tuples(st.integers(0, 5000), numbers), min_size=1, max_size=900, unique_by=lambda p: p[0]))
def test_every_point_lies_inside_the_plot(points: list[tuple[int, float]]) -> None:
    points.sort()
    drawn = chart("t", "", {"a": Series([s for s, _ in points], [v for _, v in points])})
    assert drawn is not None
    places = [tuple(map(float, pair.split())) for pair in drawn.lines[0].raw[1:].split("L")]
    assert len(places) <= MOST_POINTS * 2
    assert all(LEFT <= x <= RIGHT and TOP - 0.1 <= y <= BOTTOM + 0.1 for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert all(h.width >= 0 for h in drawn.hovers)


def test_thinning_keeps_a_spike() -> None:
    values = [0.0] * 5000
    values[1234] = 1.0
    drawn = chart("t", "", {"a": Series(list(range(5000)), values)})
    assert drawn is not None
    assert f" {TOP}" in drawn.lines[0].raw
