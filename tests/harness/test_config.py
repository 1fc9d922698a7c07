"""The configuration: YAML in, YAML out, and one clear sentence for everything else."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llm_gym.errors import ConfigError
from llm_gym.harness.config import LossConfig, TrainConfig
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
