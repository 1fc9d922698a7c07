"""A student learns from a teacher that reinforcement has taught, in fewer steps than the teacher took."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_gym.harness import TrainConfig, Trainer, load

pytestmark = pytest.mark.heavy
EVAL = "eval.episodes=256"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """The embedded model after GRPO, and its sampled reward on unseen problems."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    rows = Trainer(load(TrainConfig, sets=["steps=40", EVAL]), out=out).train()
    return str(out / "checkpoints" / "step_000040"), rows[-1]["eval/sampled_reward"]


@pytest.mark.soak  # in CI: test_loops_nproc.py, test_vllm_loops.py
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_the_students_reward_rises_towards_the_teachers(tmp_path: Path, teacher: tuple[str, float], kl: str) -> None:
    folder, best = teacher
    sets = [f"distill.teacher={folder}", f"distill.kl={kl}", "steps=10", "optimizer.lr=5e-4", EVAL]
    rows = Trainer(load(TrainConfig, sets=sets), out=tmp_path / "run").train()
    first, last = rows[0]["eval/sampled_reward"], rows[-1]["eval/sampled_reward"]
    assert best > first + 0.1
    assert last > first + 0.3 * (best - first)
