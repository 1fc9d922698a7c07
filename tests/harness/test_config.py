"""The configuration: YAML in, YAML out, and one clear sentence for everything else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.core import Sampling
from llm_gym.errors import ConfigError
from llm_gym.harness.algorithms.importance_sampling import CorrectionConfig
from llm_gym.harness.algorithms.losses import LossConfig
from llm_gym.harness.config import DistillConfig, TrainConfig
from llm_gym.harness.data.mixture import EnvConfig
from llm_gym.harness.evaluation.evaluator import EvalConfig
from llm_gym.harness.learner.optimizers import OptimizerConfig
from llm_gym.harness.loops.sft_config import SFTConfig, SFTEvalConfig
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.settings import dump, from_dict, load, parse_scalar


def test_round_trip_is_equal() -> None:
    config = load(TrainConfig, sets=["loss.clip_high=0.28", "optimizer.betas=[0.9, 0.95]", "sampling.temperature=0.7"])
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config
    assert (config.loss.clip_high, config.optimizer.betas) == (0.28, (0.9, 0.95))


@given(st.integers(1, 10**6), st.floats(1e-9, 1), st.dictionaries(st.text("abc", min_size=1), st.integers()))
def test_any_values_survive_yaml(steps: int, lr: float, env_args: dict[str, int]) -> None:
    config = load(TrainConfig, steps=steps, env_args=env_args, sets=[f"optimizer.lr={lr!r}"])
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config
    assert config.optimizer.lr == lr


def test_a_secret_is_not_written_down() -> None:
    """config.yaml lies in the run folder, and goes to loggers."""
    config = load(TrainConfig, sets=["policy.server.token=s3cret", "policy.server.retry_seconds=5"])
    assert config.policy.server == {"token": "s3cret", "retry_seconds": 5}
    assert "s3cret" not in dump(config)
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))).policy.server == {"retry_seconds": 5}


def test_file_then_given_then_sets(tmp_path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 3\nseed: 3\nloss: {clip_low: 0.3, clip_high: 0.3}\n")
    config = load(TrainConfig, file, ["loss.clip_high=0.4"], seed=4, model=None)
    assert (config.steps, config.seed, config.loss) == (3, 4, LossConfig(clip_low=0.3, clip_high=0.4))


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["stepz=3"], ["stepz", "steps"]),
        (["loss.clip_hihg=0.3"], ["loss.", "clip_hihg", "clip_high"]),
        (["loss.kl=k9"], ["loss.kl", "k9"]),
        (["steps=many"], ["steps", "many", "whole number"]),
        (["steps=0"], ["steps", "0", "at least 1"]),
        (["loss=3"], ["loss", "3", "mapping"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas", "2 values"]),
        (["sampling.top_p=0.9"], ["sampling", "top_p"]),
        (["sampling.temperature=-1"], ["sampling.temperature", "-1"]),
        (["loss.kl=k2"], ["loss.kl_weight", "k2"]),
        (["seed"], ["--set", "seed", "key=value"]),
    ],
)
def test_mistakes_are_named(sets: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, sets=sets)
    assert all(word in str(error.value) for word in said), str(error.value)
    assert "\n" not in str(error.value)


WRITTEN = [
    ({"step": 3}, "configuration key: unknown value 'step'; did you mean 'steps'?"),
    ({"steps": "3"}, "steps: got '3', want a whole number."),
    ({"steps": 0}, "steps: got 0, want at least 1."),
    ({"truncated": "msak"}, "truncated: unknown value 'msak'; did you mean 'mask'?"),
    ({"loss": 3}, "loss: got 3, want a mapping of settings."),
    ({"loss": {"name": "gpso"}}, "loss.name: unknown value 'gpso'; did you mean 'gspo'?"),
    ({"loss": {"nmae": "gspo"}}, "configuration key: unknown value 'loss.nmae'; did you mean 'loss.name'?"),
    ({"eval": {"envs": [{"evn": "GSM8K-v0"}]}}, "unknown value 'eval.envs[0].evn'; did you mean 'eval.envs[0].env'?"),
    ({"sampling": {"temperature": "hot"}}, "sampling.temperature: got 'hot', want a number."),
]


@pytest.mark.parametrize(("given", "said"), WRITTEN)
def test_python_and_yaml_say_the_same_sentence(given, said: str) -> None:
    for made in (lambda: TrainConfig(**given), lambda: from_dict(TrainConfig, yaml.safe_load(yaml.safe_dump(given)))):
        with pytest.raises(ConfigError) as error:
            made()
        assert str(error.value).endswith(said)


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        (LossConfig, "nmae", "gspo", "configuration key: unknown value 'loss.nmae'; did you mean 'loss.name'?"),
        (LossConfig, "clip_low", "wide", "loss.clip_low: got 'wide', want a number."),
        (CorrectionConfig, "high", 0.5, "loss.correction.high: got 0.5, want at least 1."),
        (OptimizerConfig, "betas", 0.9, "optimizer.betas: got 0.9, want a list."),
        (LoraConfig, "rank", 1.5, "lora.rank: got 1.5, want a whole number."),
        (EvalConfig, "envs", ({"env": 1.5},), "eval.envs[0].env: got 1.5, want text."),
        (EnvConfig, "weight", "much", "envs.weight: got 'much', want a number."),
        (DistillConfig, "kl", "ful", "distill.kl: unknown value 'ful'; did you mean 'full'?"),
        (SFTConfig, "step", 3, "configuration key: unknown value 'step'; did you mean 'steps'?"),
        (SFTEvalConfig, "every", "2", "eval.every: got '2', want a whole number."),
        (Sampling, "temperature", "hot", "sampling.temperature: got 'hot', want a value in [0, inf)."),
    ],
)
def test_so_does_every_section_by_itself(section, name: str, value, said: str) -> None:
    with pytest.raises(ValueError, match=r"[.?]$") as error:
        section(**{name: value})
    assert str(error.value) == said


def test_a_section_may_be_a_mapping_in_python() -> None:
    config = TrainConfig(loss={"name": "gspo", "correction": {"name": "tis"}}, optimizer={"lr": 1e-3}, lora={})  # type: ignore[arg-type]
    assert config.loss == LossConfig(name="gspo", correction=CorrectionConfig(name="tis"))
    assert config.optimizer == dataclasses.replace(TrainConfig().optimizer, lr=1e-3)
    assert config.lora == LoraConfig()
    assert dataclasses.replace(config, eval={"episodes": 3}).eval == EvalConfig(episodes=3)  # type: ignore[arg-type]
    assert TrainConfig(envs=[{"env": "GSM8K-v0"}]).envs == (EnvConfig("GSM8K-v0"),)  # type: ignore[arg-type]


def test_python_has_numbers_and_paths_that_yaml_has_not(tmp_path) -> None:
    config = TrainConfig(steps=np.int64(3), overlong=np.float32(0.5), model=tmp_path)  # type: ignore[arg-type]
    assert (config.steps, config.overlong, config.model) == (3, 0.5, str(tmp_path))
    assert from_dict(TrainConfig, yaml.safe_load(dump(config))) == config


def test_what_python_refuses_itself_is_left_to_it() -> None:
    with pytest.raises(TypeError, match="multiple values for argument 'env'"):
        EnvConfig("GSM8K-v0", env="GSM8K-v0")  # type: ignore[misc]


def test_a_missing_or_broken_file_is_one_sentence(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(TrainConfig, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML") as error:
        load(TrainConfig, tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_a_section_given_in_part_changes_only_that_part() -> None:
    default = TrainConfig().optimizer
    changed = load(TrainConfig, sets=["optimizer.lr=0.1"]).optimizer
    assert changed == dataclasses.replace(default, lr=0.1)
    assert changed.schedule == "linear"


def test_scalars_mean_what_people_mean() -> None:
    values = ["1e-4", "true", "3", "x1", "[1, 2]", "null", "train[:5%]", "1_000_x"]
    assert [parse_scalar(v) for v in values] == [1e-4, True, 3, "x1", [1, 2], None, "train[:5%]", "1_000_x"]
    assert parse_scalar("'42'") == "42"
    for text in ("-", "Answer: yes", "12:30", "2026-01-02", "a, b"):
        assert parse_scalar(text) == text


@pytest.mark.parametrize(("lora", "lr"), [([], 2e-4), (["lora.rank=8"], 2e-3)])
def test_what_is_left_open_is_filled_by_the_kind_of_run(lora, lr) -> None:
    config = load(TrainConfig, sets=lora).resolved()
    assert config.optimizer.lr == lr
    assert config.resolved() == config
