"""Runs whose rollouts are ahead of the learner, with the built-in engine."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from llm_gym.core import Episode, Group
from llm_gym.envs.arithmetic import Arithmetic
from llm_gym.errors import ConfigError, TrainingError
from llm_gym.harness import TrainConfig, Trainer
from llm_gym.harness.loops.replay import replay
from llm_gym.harness.runs.run_folder import RunFolder
from llm_gym.vector import TextVectorEnv

SMALL: dict[str, Any] = {
    "prompts_per_step": 4,
    "group_size": 4,
    "eval": {"episodes": 8, "every": 3},
    "checkpoint": {"every": 1, "keep": 0},
}


def config(bound: int, steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(**SMALL | {"steps": steps, "stream": {"max_staleness": bound}} | more)


def train(out: Path, bound: int, steps: int, *, resume: bool = False, **more: Any) -> list[dict[str, Any]]:
    return Trainer(config(bound, steps, **more), out=out, resume=resume, observer=object()).train()


def trained_on(run: Path, step: int) -> list[Episode]:
    return RunFolder(run).read_episodes(f"step_{step:06d}")


def versions(episode: Episode) -> set[int]:
    return {int(v) for turn in episode.turns for v in turn.completion.versions}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stream") / "run"
    train(out, 2, 7)
    return out


def test_tokens_are_as_old_as_the_bound_and_no_older(run: Path) -> None:
    ages = [step - 1 - v for step in range(1, 8) for e in trained_on(run, step) for v in versions(e)]
    assert (min(ages), max(ages)) == (0, 2)
    rows = RunFolder(run).metrics()[1:]
    assert [row["stream/ended"] for row in rows] == [4 * step for step in range(1, 8)]
    assert max(row["stream/staleness_max"] for row in rows) == 2
    assert max(row["sync/canary_gap_max"] for row in rows) < 1e-3
    assert max(row["sampler/logprob_gap_max"] for row in rows if row["stream/staleness_max"] == 0) < 1e-3


def test_the_rate_of_rollouts_is_that_of_the_whole_step(run: Path) -> None:
    """They go on while the learner learns; what a step waits for them says nothing."""
    for row in RunFolder(run).metrics()[1:]:
        assert row["tokens_per_second/rollout"] == pytest.approx(row["tokens/generated"] / row["time/step"])


def test_its_tasks_are_those_of_a_run_that_waits(run: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", 0, 3)
    for step in range(1, 4):
        seeds = [[e.seed for e in trained_on(out, step)] for out in (run, tmp_path / "run")]
        assert seeds[0] == seeds[1]


def test_evaluation_beside_rollouts_has_one_version_and_no_failed_episode(run: Path) -> None:
    for step in (3, 6, 7):
        episodes = RunFolder(run).read_episodes(f"eval_{step:06d}")
        assert {v for e in episodes for v in versions(e)} == {step}
        assert not any(e.stop_reason.failed for e in episodes)


def test_every_step_replays_bit_for_bit(run: Path) -> None:
    for step in range(2, 8):
        (found,) = replay(run, step)
        assert found.differences == ()
        assert found.metrics > 5
        assert found.tensors > 0


def test_a_run_that_goes_on_ends_every_task_once(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, 2, 3)
    rows = train(out, 2, 7, resume=True)
    assert [row["step"] for row in rows] == list(range(8))
    times = [json.loads(line) for line in (out / "timeline.jsonl").read_text().splitlines()]
    assert [(row["step"], row["since"]) for row in times] == [(step, 0 if step < 4 else 3) for step in range(1, 8)]
    for step in range(1, 8):
        assert [(e.seed, e.member) for e in trained_on(out, step)] == [
            (e.seed, e.member) for e in trained_on(run, step)
        ]
        assert all(0 <= step - 1 - v <= 2 for e in trained_on(out, step) for v in versions(e))


@pytest.mark.parametrize("every", [0, 1])
def test_what_no_episode_of_could_be_played_is_played_again_where_the_run_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    out, more = tmp_path / "run", {"eval": {"episodes": 0}, "checkpoint": {"every": every}}
    trainer = Trainer(config(2, 5, **more), out=out, observer=object())
    trainer.train_step()
    with monkeypatch.context() as broken:
        broken.setattr(Arithmetic, "open", lambda self: [][0])
        with pytest.raises(TrainingError, match="each of its 16 episodes failed"):
            trainer.train()
    rows = train(out, 2, 5, resume=True, **more)
    assert [row["stream/ended"] for row in rows] == [4 * row["step"] for row in rows]
    for step in range(1, 6):
        assert [e.seed for e in trained_on(out, step)] == [e.seed for e in trained_on(run, step)]


def test_weights_may_be_sent_every_few_steps(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", 2, 7, stream={"max_staleness": 2, "sync_every": 3}, eval={"episodes": 0})[1:]
    assert ["sync/mode" in row for row in rows] == [False, False, True, False, False, True, True]
    assert max(row["stream/staleness_max"] for row in rows) == 2
    assert {v for e in trained_on(tmp_path / "run", 7) for v in versions(e)} <= {3, 6}


class Straggler(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Every tenth task takes twenty turns of the event loop for one of the others: it is answered after twenty tries."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = 20 if (seed or 0) % 10 == 0 else 1
        self.held: Any = super().reset(seed=seed, options=options)
        return self.held

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left:
            return (self.held[0], 0.0, False, False, self.held[1])
        return super().step(action)


gymnasium.register(
    "straggler/Sums-v0",
    entry_point=lambda **options: Straggler(gymnasium.make("llm_gym/Arithmetic-v0", **options).unwrapped),
    vector_entry_point=TextVectorEnv,
)


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_stragglers_are_trained_on_as_often_as_others(tmp_path: Path, bound: int) -> None:
    out, steps = tmp_path / "run", 12
    rows = train(out, bound, steps, env="straggler/Sums-v0", eval={"episodes": 0}, checkpoint={"every": 0})[1:]
    assert max(row["stream/staleness_max"] for row in rows) == bound
    trained = [[e.seed for e in trained_on(out, step)][::4] for step in range(1, steps + 1)]
    slow = sum(seed % 10 == 0 for seeds in trained for seed in seeds)
    assert len({seed for seeds in trained for seed in seeds}) == 4 * steps
    assert abs(slow - 0.1 * 4 * steps) <= 2 * math.sqrt(0.1 * 0.9 * 4 * steps)
    lengths = [len(e.turns) for step in range(1, steps + 1) for e in trained_on(out, step)]
    assert max(lengths) == 20
    assert not any(e.stop_reason.failed for step in range(1, steps + 1) for e in trained_on(out, step))


def test_importance_corrections_see_each_tokens_own_version(tmp_path: Path) -> None:
    """What the sampler said of a token is kept: ratios differ from 1 exactly where weights have moved since."""
    rows = train(tmp_path / "run", 2, 6, eval={"episodes": 0}, optimizer={"lr": 3e-4, "warmup_steps": 0})[1:]
    gaps = [row["sampler/logprob_gap_mean"] for row in rows]
    assert gaps[0] < 1e-4
    assert np.nanmax(gaps[2:]) > 1e-3


@pytest.mark.timeout(120)
def test_what_one_group_runs_into_is_not_told_after_the_slowest(tmp_path: Path) -> None:
    trainer = Trainer(config(1, 2, eval={"episodes": 0}), out=tmp_path / "run", observer=object())
    never, wrong = Future[Group](), Future[Group]()
    wrong.set_exception(ConfigError("env: it is gone"))
    with pytest.raises(ConfigError, match="it is gone"):
        trainer.playing.wait([never, wrong])
    trainer.close()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"policy": {"sync": "shared"}}, "'shared' does not work with .* while rollouts go on"),
        ({"policy": {"engine": "vllm", "sync": "restart"}}, "'restart' does not work with .* while rollouts go on"),
    ],
)
def test_modes_that_cannot_work_are_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Trainer(config(1, 2, **more), out=tmp_path / "run", observer=object())


def test_the_bound_of_a_run_is_its_own(run: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", 1, 2)
    with pytest.raises(ConfigError, match="max_staleness"):
        Trainer(config(2, 4), out=tmp_path / "run", resume=True, observer=object())
