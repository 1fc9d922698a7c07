"""The sampler of a training run, and how the learner's weights reach it."""

from __future__ import annotations

from typing import Any

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.config import TrainConfig
from llm_gym.policies import ENGINES, Policy, make_policy
from llm_gym.policies.transformers import TransformersPolicy


def engine_of(config: TrainConfig) -> str:
    """The engine that samples; `auto` is the built-in one, which shares the learner's weights.

    Raises:
        ConfigError: an unknown engine, or one that cannot sample this run.
    """
    name = "transformers" if config.policy.engine == "auto" else config.policy.engine
    if name not in ENGINES:
        raise ConfigError(unknown("policy.engine", name, ["auto", *ENGINES]))
    if name != "transformers" and config.lora is not None:
        raise ConfigError(
            f"policy.engine: {name!r} cannot sample adapters yet; use 'transformers', or set lora to null."
        )
    return name


def make_sampler(config: TrainConfig, model: Any, *, version: int) -> Policy:
    """A policy with the learner's weights as they are now: the module itself, or a copy in its own engine."""
    name = engine_of(config)
    if name == "transformers":
        return make_policy(model, engine=name, version=version, max_rows=config.policy.max_rows)
    policy = make_policy(config.model, engine=name, dtype=config.optimizer.dtype, **config.policy.vllm)
    push(model, policy, version=version)
    return policy


def push(model: Any, policy: Policy, *, version: int) -> None:
    """Makes `policy` sample from `model` as it is now; every cache of the old weights is dropped."""
    if isinstance(policy, TransformersPolicy):
        policy.refresh(version=version)
    else:
        policy.load(model.state_dict().items(), version=version)
