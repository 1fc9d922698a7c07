from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Completion, Episode, StopReason, Turn
from llm_gym.envs import make
from llm_gym.harness.evaluation.evaluator import EVAL_SEED, metrics
from llm_gym.harness.evaluation.statistics import Z95, mean_interval, pass_at, summary, wilson
from llm_gym.trajectories import trajectories


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
    return Episode("e", 0, trajectories([turn]), stop, {"correct": reward}, error="Boom: x" if stop.failed else None)


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


def test_one_value_a_task_is_the_plain_interval() -> None:
    values = np.random.default_rng(1).gamma(2.0, 1.0, 50).tolist()
    half = Z95 * np.std(values, ddof=1) / math.sqrt(50)
    low, high, kind = mean_interval(values, list(range(50)))
    assert (low, high) == (pytest.approx(np.mean(values) - half), pytest.approx(np.mean(values) + half))
    assert mean_interval([0.0, 1.0, 1.0], [4, 9, 2]) == (*wilson(2, 3), "wilson")
    assert kind == "normal"


@pytest.mark.parametrize("whole", [True, False])
def test_copies_of_a_completion_add_nothing(whole: bool) -> None:
    """Sixteen equal episodes of each task are one: the interval is that of the tasks (up to T / (T - 1))."""
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0] if whole else [0.3, 0.9, 0.2, 0.6]
    once = mean_interval(values)
    often = mean_interval(np.repeat(values, 16).tolist(), np.repeat(np.arange(len(values)), 16).tolist())
    assert often[0] == pytest.approx(once[0])
    assert often[1] == pytest.approx(once[1])
    assert mean_interval([1.0] * 32, [0] * 16 + [1] * 16) == pytest.approx((*wilson(2, 2), "wilson"))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_clustered_coverage_is_about_95_percent(scale: float) -> None:
    """Tasks of unlike difficulty, eight episodes each; an interval that took them as independent covers 70%."""
    rng = np.random.default_rng(2)
    tasks = np.repeat(np.arange(40), 8)
    hits, naive = [], []
    for _ in range(1500):
        p = rng.beta(0.7, 0.7, 40)
        values = (scale * (rng.random(320) < p[tasks])).tolist()
        low, high, _ = mean_interval(values, tasks.tolist())
        hits.append(low <= scale / 2 <= high)
        low, high, _ = mean_interval(values)
        naive.append(low <= scale / 2 <= high)
    assert 0.92 < np.mean(hits) < 0.97
    assert np.mean(naive) < 0.8


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 8))
def test_pass_at_k_is_the_fraction_of_k_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    c = min(c, n)
    found = pass_at(k, [c], [n])
    if k > n:
        assert len(found) == 0
        return
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert found[0] == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over draws of 10 episodes is 1 - (1 - p)^k; that of 1 - (1 - c/n)^k is not."""
    rng = np.random.default_rng(3)
    passed = rng.binomial(10, 0.2, 20_000)
    assert pass_at(4, passed.tolist(), [10] * 20_000).mean() == pytest.approx(1 - 0.8**4, abs=0.006)
    assert (1 - (1 - passed / 10) ** 4).mean() < 1 - 0.8**4 - 0.02


def test_summary_of_several_episodes_a_task() -> None:
    seen = [dataclasses.replace(episode(r), seed=s) for s, r in ((1, 1.0), (1, 1.0 - 1e-9), (2, 0.0), (2, 1.0))]
    found = summary([*seen, dataclasses.replace(episode(1.0, StopReason.POLICY_ERROR), seed=2)], 1.0)
    assert {k: v["mean"] for k, v in found["pass"].items()} == {"1": 0.75, "2": 1.0}
    assert "pass" not in summary([episode(1.0)], 1.0)
    assert summary(seen, 1.0, mark=2.0)["pass"]["1"]["mean"] == 0


def asked(question: int, reward: float, seed: int, turns: int = 1) -> Episode:
    return said_to(np.array([question, 1], np.int32), reward, seed, turns)


def said_to(prompt: np.ndarray, reward: float, seed: int, turns: int = 1) -> Episode:
    completion = Completion(np.array([5], np.int32), np.zeros(1, np.float32), "stop")
    turn = Turn(prompt, completion, reward / turns)
    return Episode("e", seed, trajectories([turn] * turns), StopReason.ANSWERED, {"reward": reward})


def test_the_same_question_from_another_seed_is_the_same_problem() -> None:
    """Played twice, it says nothing new: the interval is that of the different ones."""
    once = [asked(q, float(q % 3 == 0), seed=q) for q in range(40)]
    twice = once + [asked(q, float(q % 3 == 0), seed=100 + q) for q in range(40)]
    one, two = summary(once, 1.0), summary(twice, 1.0)
    assert (one["problems"], two["problems"], two["episodes"]) == (40, 40, 80)
    assert two["reward"] == pytest.approx(one["reward"])
    assert metrics(two, "eval/", "greedy")["eval/problems"] == 40


def test_what_a_game_hides_makes_problems_of_one_opening_different() -> None:
    games = [asked(7, float(seed % 2), seed) for seed in range(10)]
    assert summary(games, 1.0)["problems"] == 10
    long = [asked(seed % 2, float(seed % 2), seed, turns=2) for seed in range(10)]
    assert summary(long, 1.0)["problems"] == 10


def test_the_512_unseen_problems_of_arithmetic_are_378() -> None:
    env = make("llm_gym/Arithmetic-v0", split="test")
    every = [said_to(env.reset(seed=EVAL_SEED + i)[0], 1.0, i) for i in range(512)]
    assert summary(every, 1.0)["problems"] == 378
