"""Several optimizer steps per rollout, and what a run trains on: the trainer's side of the algorithms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_trainer import StopAfter, config, stable, weights

from llm_gym.cli.group import llmgym
from llm_gym.core import StopReason, group
from llm_gym.errors import ConfigError
from llm_gym.harness import Trainer
from llm_gym.harness.algorithms.rewards import rewards_of
from llm_gym.harness.runs.metrics import combine
from llm_gym.harness.runs.run_folder import RunFolder

MANY = ("minibatches=2", "epochs=2", "loss.correction.name=tis", "optimizer.lr=0.001")


def test_interrupted_and_resumed_with_several_updates(tmp_path: Path) -> None:
    whole = Trainer(config(*MANY, steps=4), out=tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config(*MANY, steps=4), out=tmp_path / "cut", observer=StopAfter(4)).train()
    again = Trainer(config(*MANY, steps=4), out=tmp_path / "cut", resume=True)
    assert (again.step, again.learner.step_count, again.learner.total_steps) == (2, 8, 16)
    assert stable(again.train()) == stable(whole)
    ends = [weights(tmp_path / run / "checkpoints" / "step_000004") for run in ("whole", "cut")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_minibatches_share_out_the_groups_and_epochs_repeat_them(tmp_path: Path, monkeypatch) -> None:
    """Credits come from the whole rollout; old and proximal log-probabilities stay; the ratio moves off 1."""
    run = Trainer(config(*MANY, "prompts_per_step=3", "advantage=reinforce_pp", steps=1), out=tmp_path / "run")
    episodes = run.collect().episodes
    groups = group(episodes, 4)
    seen = []
    step = run.learner.step
    monkeypatch.setattr(
        run.learner, "step", lambda batch, **how: seen.append((batch, step(batch, **how))) or seen[-1][1]
    )
    row = run.learning.learn(groups, 0)
    run.close()
    assert len(seen) == 4
    assert seen[0][0] is seen[2][0]
    assert seen[1][0] is seen[3][0]
    trained = {float(a) for batch, _ in seen for m in batch.micro for a in m.streams["advantages"]}
    credits = run.learning.compute_advantages(rewards_of(groups))
    assert trained == {float(np.float32(a)) for a in credits.ravel() if a}
    assert (
        sum(batch.tokens for batch, _ in seen) == 2 * sum(e.tokens_generated for e in episodes) == row["tokens/trained"]
    )
    ratios = [metrics["policy/ratio_mean"] for _, metrics in seen]
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert abs(ratios[3] - 1) > 1e-6
    assert row["sampler/logprob_gap_max"] == seen[0][1]["sampler/logprob_gap_max"] < 1e-4
    assert seen[3][1]["sampler/logprob_gap_max"] > 1e-4


def test_one_row_of_several_updates() -> None:
    first = {"policy/loss": 1.0, "policy/lr": 2.0, "tokens/trained": 5.0, "sampler/logprob_gap_max": 0.1}
    second = {"policy/loss": float("nan"), "policy/lr": 1.0, "tokens/trained": 7.0, "sampler/logprob_gap_max": 9.0}
    assert combine([first]) == first
    assert combine([first, second]) == {**first, "policy/lr": 1.0, "tokens/trained": 12.0}


@pytest.mark.parametrize(("truncated", "left"), [("train", 8), ("mask", 6)])
def test_cut_episodes_are_trained_or_masked(tmp_path: Path, truncated: str, left: int) -> None:
    """A masked one keeps its place in its group's baseline."""
    run = Trainer(config(f"truncated={truncated}", steps=1), out=tmp_path / "run")
    episodes = [dataclasses.replace(e, stop_reason=StopReason.ANSWERED) for e in run.collect().episodes]
    run.close()
    for i in (1, 6):
        episodes[i] = dataclasses.replace(episodes[i], stop_reason=StopReason.TOKEN_LIMIT)
    groups = group(episodes, 4)
    run.learning.compute_advantages = lambda rewards: np.where(
        np.isnan(rewards.returns), np.nan, np.arange(1.0, 9).reshape(2, 4)
    )
    (batch,) = run.learning.batches(groups)
    assert batch.episodes == left
    kept = [e for i, e in enumerate(episodes) if truncated == "train" or i not in (1, 6)]
    assert batch.tokens == sum(e.tokens_generated for e in kept)
    on = {float(a) for m in batch.micro for a in m.streams["advantages"]}
    assert on == {1.0, 3, 4, 5, 6, 8} | ({2.0, 7.0} if truncated == "train" else set())
    np.testing.assert_array_equal(rewards_of(groups).returns, [[e.reward for e in g.episodes] for g in groups])


def test_the_overlong_penalty_knows_the_limit(tmp_path: Path) -> None:
    """`sampling.max_tokens`, or the environment's own if that is lower."""
    run = Trainer(config("overlong=0.5", steps=1), out=tmp_path / "run")
    run.close()
    assert run.env_specs[0].limit == 12
    lower = Trainer(config("overlong=0.5", steps=1, env_args={"max_tokens": 7}), out=tmp_path / "lower")
    lower.close()
    assert lower.env_specs[0].limit == 7


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["minibatches=3"], "minibatches: got 3, want at most the 2 prompts"),
        (["epochs=0"], "epochs: got 0"),
        (["overlong=2"], "overlong: got 2"),
        (["truncated=drop"], "truncated: unknown value 'drop'"),
        (["loss.correction.name=tiss"], "loss.correction.name"),
    ],
)
def test_mistakes_are_named(sets: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*sets)


def test_a_preset_on_the_command_line(tmp_path: Path) -> None:
    """`--preset`, and a mistake in it before anything is loaded."""
    small = [f"--set={s}" for s in ("eval.episodes=0", "prompts_per_step=2", "group_size=2", "loss.clip_high=0.3")]
    done = CliRunner().invoke(llmgym, ["train", "--preset=dapo", "--steps=1", f"--out={tmp_path / 'run'}", *small])
    assert done.exit_code == 0, done.output
    text = RunFolder(tmp_path / "run").config_file.read_text()
    assert "overlong: 0.2" in text
    assert "clip_high: 0.3" in text
    wrong = CliRunner().invoke(llmgym, ["train", "--preset=dappo", f"--out={tmp_path / 'other'}"])
    assert wrong.exit_code == 2
    assert "did you mean 'dapo'" in wrong.output
