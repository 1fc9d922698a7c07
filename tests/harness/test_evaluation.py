"""Evaluation: unseen problems, several completions of each, several environments, and the best checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from llm_gym.core import Completion, Episode, Sampling, StopReason, Turn
from llm_gym.env import Reply, TextEnv
from llm_gym.errors import ConfigError, SettingError
from llm_gym.harness import TrainConfig, Trainer, load
from llm_gym.harness.evaluation.evaluator import EVAL_SEED, EvalConfig, Evaluation, eval_task, eval_tasks, metrics
from llm_gym.harness.evaluation.statistics import summary
from llm_gym.harness.runs.run_folder import RunFolder, step_of
from llm_gym.policies import make_policy
from llm_gym.trajectories import trajectories


class Even(TextEnv):
    """Solved by an even number of characters; another part of the reward is always half."""

    eval_args = {"split": "test"}  # noqa: RUF012

    def __init__(self, split: str = "train", **kwargs) -> None:
        super().__init__(**kwargs)
        self.split = split

    def open(self):
        return [{"role": "user", "content": f"{self.split} {self.np_random.integers(1 << 30)}"}]

    def reply(self, text: str) -> Reply:
        return Reply(reward={"even": float(len(text) % 2 == 0), "half": 0.5}, done=True)


if "test/Even-v0" not in gymnasium.registry:
    gymnasium.register("test/Even-v0", entry_point=Even)

SMALL = ["eval.episodes=6", "sampling.max_tokens=8", "prompts_per_step=2", "group_size=2"]


def config(*sets: str) -> TrainConfig:
    return load(TrainConfig, env="test/Even-v0", sets=[*SMALL, *sets])


def episode(seed: int, reward: float, stop: StopReason = StopReason.ANSWERED, **parts: float) -> Episode:
    ids = np.zeros(3, np.int32)
    turn = Turn(ids, Completion(ids, np.zeros(3, np.float32), "stop"), reward)
    return Episode("e", seed, trajectories([turn]), stop, parts or {"correct": reward})


def test_metrics_of_a_summary() -> None:
    seen = [episode(s, r, a=r, b=0.0) for s, r in ((1, 1.0), (1, 0.0), (2, 1.0), (2, 1.0))]
    found = summary([*seen, episode(3, 1.0, StopReason.ENV_ERROR), episode(3, 0.0, StopReason.TOKEN_LIMIT)], 1.0)
    row = metrics(found, "eval/x/", "sampled")
    assert row["eval/x/sampled_reward"] == 3 / 5
    assert row["eval/x/sampled_reward_low"] < 3 / 5 < row["eval/x/sampled_reward_high"]
    assert row["eval/x/sampled_reward/a"] == 3 / 5
    assert (row["eval/x/pass@1"], row["eval/x/pass@2"]) == ((0.5 + 1 + 0) / 3, 1.0)
    ends = {name.rpartition("/")[2]: value for name, value in row.items() if "stop/" in name}
    known = {"answered": 4 / 6, "token_limit": 1 / 6, "failed": 1 / 6}
    assert ends == {"turn_limit": 0, "time_limit": 0, "bad_reply": 0} | known
    assert math.fsum(ends.values()) == pytest.approx(1)
    greedy = metrics(found, "eval/", "greedy")
    assert {"eval/greedy_reward", "eval/greedy_reward/b"} < greedy.keys()
    assert not any("pass@" in name or "stop" in name for name in greedy)


def test_metrics_of_failures_only_are_nan() -> None:
    row = metrics(summary([episode(1, 1.0, StopReason.TOOL_FAILURE)], 1.0), "eval/", "sampled")
    assert all(math.isnan(row[f"eval/sampled_reward{end}"]) for end in ("", "_low", "_high"))


def test_several_environments_are_measured_as_each_alone() -> None:
    """The row of a run with further environments holds what a run on each of them alone would say."""
    more = "{name: train, env_args: {split: train}}, {env: Arithmetic-v0, env_args: {digits_max: 3}}"
    both = config("eval.k=2", f"eval.envs=[{more}, {{env: test/Even-v0, name: again}}]").eval
    policy = make_policy(None, engine="transformers")
    played: list[tuple[float, int, int]] = []

    def play(driver, phase, seeds, size, sampling: Sampling):
        played.append((sampling.temperature, len(seeds), size))
        assert phase == "eval"
        assert min(seeds) >= EVAL_SEED
        return driver.run(seeds, group_size=size, sampling=sampling, seed=3)

    def row(settings: EvalConfig, env: str, **env_args: object):
        evaluation = Evaluation(eval_tasks(settings, env, env_args), policy, settings, max_tokens=6)
        measured, transcripts = evaluation(play)
        evaluation.close()
        return measured, transcripts

    found, transcripts = row(both, "test/Even-v0", tokenizer=None, split="test")
    alone = config("eval.k=2").eval
    for name, env, args in (
        ("", "test/Even-v0", {"split": "test"}),
        ("train/", "test/Even-v0", {"split": "train"}),
        ("Arithmetic-v0/", "Arithmetic-v0", {"split": "test", "digits_max": 3}),
        ("again/", "test/Even-v0", {"split": "test"}),
    ):
        expected = row(alone, env, **args)[0]
        assert {key: found[key.replace("eval/", f"eval/{name}", 1)] for key in expected} == expected
    assert [n for _, n, _ in played[:8]] == [6] * 8
    assert [(temperature, size) for temperature, _, size in played[:8]] == [(0.0, 1), (1.0, 2)] * 4
    assert {name: e[0].messages[0]["content"].split()[0] for name, e in transcripts.items()} == {
        "": "test", "train": "train", "Arithmetic-v0": "What", "again": "test",
    }  # fmt: skip
    policy.close()


def test_an_environment_with_rows_plays_its_first_rows_once() -> None:
    paper = eval_task("GSM8K-v0", {"dataset": "sample"})
    assert (paper.rows, len(paper.seeds(512)), len(paper.seeds(5))) == (12, 12, 5)
    env = paper.make()
    questions = [env.reset(seed=seed)[1]["messages"][-1]["content"] for seed in paper.seeds(512)]
    env.close()
    plain = gymnasium.make("llm_gym/GSM8K-v0", dataset="sample")
    rows = [plain.reset(seed=0, options={"task": i})[1]["messages"][-1]["content"] for i in range(12)]
    assert questions == rows
    assert len(set(rows)) == 12


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("eval.k=0", "eval.k: got 0"),
        ("eval.temperature=0", "eval.temperature"),
        ("eval.envs=[{}]", r"eval.envs\[0\].name: got ''"),
        ("eval.envs=[{name: a/b}]", "a/b"),
        ("eval.envs=[{name: sampled_reward}]", "sampled_reward"),
        ("eval.envs=[{name: a}, {name: a}]", r"eval.envs\[1\]"),
        ("eval.envs=[{env: Even-v0, nmae: a}]", r"eval.envs\[0\].name"),
    ],
)
def test_bad_settings(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(setting)


def test_an_environment_that_cannot_be_made_stops_the_run_before_it_begins(tmp_path: Path) -> None:
    for more, said in (("{env: Evne-v0}", "Even|GSM8K|valid"), ("{name: x, env_args: {splt: x}}", "split")):
        with pytest.raises(SettingError, match=said):
            Trainer(config(f"eval.envs=[{more}]"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_writes_it_all_and_keeps_its_best_step(tmp_path: Path, monkeypatch) -> None:
    values = itertools.chain([9.0, 0.2, 0.7, 0.7, 0.1, 0.3])  # step 0 first

    def measured(self, play):
        return {"eval/sampled_reward": next(values)}, {"": [episode(1, 0.0)], "other": [episode(2, 0.0)]}

    monkeypatch.setattr(Evaluation, "__call__", measured)
    sets = ["eval.every=1", "checkpoint.keep_best=true", "checkpoint.keep=1", "checkpoint.every=2"]
    Trainer(load(TrainConfig, config_file(tmp_path, *sets), steps=5), out=tmp_path / "run").train()
    folder = RunFolder(tmp_path / "run")
    assert folder.best("eval/sampled_reward") == 2, "the first of two equal ones; step 0 was never saved"
    assert [step_of(c) for c in folder.checkpoints()] == [2, 5]
    best = folder.path / "checkpoints" / "best"
    assert best.resolve().name == "step_000002"
    assert (best / "model.safetensors").is_file()
    files = {file.name for file in (folder.path / "episodes").iterdir()}
    assert {"eval_000003.jsonl", "eval_000003_other.jsonl"} < files
    folder.rewind(2)
    assert "eval_000003_other.jsonl" not in {file.name for file in (folder.path / "episodes").iterdir()}
    assert best.exists()


def config_file(tmp_path: Path, *sets: str) -> Path:
    from llm_gym.harness.settings import dump

    (tmp_path / "config.yaml").write_text(dump(config(*sets)))
    return tmp_path / "config.yaml"


def test_a_best_checkpoint_that_never_appeared_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("")
    folder.save(1, lambda path: None, keep=1, best=True)

    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.save(2, dies, keep=1, best=True)
    folder.rewind(1)
    link = folder.path / "checkpoints" / "best"
    assert link.resolve().name == "step_000001"
    link.unlink()
    link.symlink_to("step_000007")  # killed between the link and the checkpoint
    folder.rewind(1)
    assert not link.is_symlink()


def test_training_measures_mean_and_pass_at_k(tmp_path: Path) -> None:
    rows = Trainer(config("eval.k=4", "eval.pass_reward=1.5"), out=tmp_path / "run")
    row = rows.evaluate()
    rows.close()
    assert {"eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/sampled_reward_low", "time/eval"} < row.keys()
    assert row["eval/pass@1"] == pytest.approx(row["eval/sampled_reward/even"])
    assert row["eval/pass@1"] <= row["eval/pass@2"] <= row["eval/pass@4"]
    assert row["eval/sampled_reward"] == pytest.approx(row["eval/sampled_reward/even"] + 0.5)
    kept = (tmp_path / "run" / "episodes" / "eval_000000.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in kept] == list(range(EVAL_SEED, EVAL_SEED + 6))
