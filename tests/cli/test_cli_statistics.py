from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.cli.statistics import Z95, mean_interval, summary, wilson
from llm_gym.core import Completion, Episode, StopReason, Turn


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case: tuple[int, int]) -> None:
    """The ends are where |p_hat - p| is z standard errors of the true p: Wilson's definition."""
    successes, trials = case
    share = successes / trials
    for p in wilson(successes, trials):
        assert abs(share - p) == pytest.approx(Z95 * math.sqrt(p * (1 - p) / trials), rel=1e-6, abs=1e-7)


def test_coverage_is_about_95_percent() -> None:
    rng = np.random.default_rng(0)
    hits = [low <= 0.9 <= high for low, high in (wilson(k, 60) for k in rng.binomial(60, 0.9, 4000).tolist())]
    assert 0.93 < np.mean(hits) < 0.97
    data = rng.gamma(2.0, 1.0, (4000, 60))
    hits = [low <= 2.0 <= high for low, high, _ in map(mean_interval, data.tolist())]
    assert 0.92 < np.mean(hits) < 0.97


def test_kinds() -> None:
    assert mean_interval([0.0, 1.0])[2] == "wilson"
    assert mean_interval([0.0, 0.5])[2] == "normal"
    assert mean_interval([0.5])[:2] == (None, None)


def episode(reward: float, stop: StopReason = StopReason.ANSWERED, tokens: int = 4) -> Episode:
    ids = np.zeros(tokens, np.int32)
    turn = Turn(ids, Completion(ids, np.zeros(tokens, np.float32), "stop"), reward)
    return Episode("e", 0, (turn,), stop, {"correct": reward}, error="Boom: x" if stop.failed else None)


def test_summary_leaves_failures_out_of_the_mean() -> None:
    found = summary([episode(1.0), episode(0.0), episode(0.0, StopReason.ENV_ERROR)], seconds=2.0)
    assert found["reward"]["mean"] == found["rewards"]["correct"] == 0.5
    assert (found["episodes"], found["failed"]) == (3, 1)
    assert found["stop_reasons"] == {"answered": 2, "env_error": 1}
    assert found["tokens"] == {"total": 12, "mean": 4.0, "per_second": 6.0}
    assert found["errors"] == {"Boom: x": 1}


def test_summary_of_nothing_but_failures() -> None:
    found = summary([episode(0.0, StopReason.POLICY_ERROR)], seconds=1.0)
    assert "reward" not in found
    assert found["failed"] == 1
