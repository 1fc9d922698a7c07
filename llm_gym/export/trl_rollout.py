"""TRL's `rollout_func`: llm_gym plays, TRL trains (https://github.com/huggingface/trl, version 1.16)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from llm_gym.core import Episode, Sampling
from llm_gym.errors import SettingError
from llm_gym.export.trl_rows import columns
from llm_gym.policies import make_policy
from llm_gym.rollouts.driver import Driver, OnEpisode
from llm_gym.rollouts.env_pool import Env


def trl_dataset(seeds: Iterable[int]) -> Any:
    """`GRPOTrainer(train_dataset=...)` for `trl_rollout_func`, a Dataset with a row for each reset seed.

    The seed is the prompt: TRL hands a rollout nothing else of a row.
    """
    from datasets import Dataset

    return Dataset.from_list([{"prompt": json.dumps({"seed": int(seed)})} for seed in seeds])


def trl_reward(completions: Sequence[Any], episode_reward: Sequence[float], **others: Any) -> list[float]:
    """`GRPOTrainer(reward_funcs=...)` for `trl_rollout_func`: the returns; NaN, which TRL passes over, for failures."""
    return list(episode_reward)


def trl_rollout_func(
    env: str | Callable[..., Env],
    *,
    env_args: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    on_episode: OnEpisode | None = None,
    **limits: Any,
) -> Callable[[Sequence[str], Any], dict[str, list[Any]]]:
    """`GRPOTrainer(rollout_func=...)`, beside `train_dataset=trl_dataset(seeds)` and `reward_funcs=trl_reward`.

    The trainer's own module samples on the built-in engine, with the trainer's tokenizer, temperature, top_k, top_p and
    min_p. Of an episode whose history was rewritten or branched TRL trains one sequence: that on which it ended.

    Args:
        env, env_args, on_episode: as of `llm_gym.rollout`.
        max_tokens: most tokens of one completion; None: the trainer's `max_completion_length`.
        limits: `time_limit` and `max_concurrent`, as of `llm_gym.rollout`.

    Returns:
        A function that plays an episode for each prompt; prompts alike are a group. Reward functions are given its
        columns `episode_reward`, `rewards` (by name), `stop_reason` and `error`.
    """

    @cache
    def driver_of(trainer: Any) -> Driver:
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        model = trainer.accelerator.unwrap_model(trainer.model)
        policy = make_policy(model, engine="transformers", tokenizer=tokenizer, autocast_dtype=_autocast(trainer.args))
        return Driver(env, policy, env_args={"tokenizer": tokenizer, **(env_args or {})}, **limits)

    def play(prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        members, played = Counter(map(_seed, prompts)), dict[int, list[Episode]]()
        driver, state = driver_of(trainer), trainer.state
        driver.policy.refresh(version=state.global_step)  # type: ignore[union-attr]
        limit = max_tokens or trainer.max_completion_length
        sampling = Sampling(trainer.temperature, limit, trainer.top_k or 0, trainer.top_p, trainer.min_p or 0.0)
        call = trainer.args.seed, state.global_step, int(state.num_input_tokens_seen), trainer.accelerator.process_index
        seed = int(np.random.SeedSequence(call).generate_state(1, np.uint64)[0])
        for size in set(members.values()):  # one size, unless a group is shared between processes
            seeds = [each for each, count in members.items() if count == size]
            for episode in driver.run(seeds, group_size=size, seed=seed, sampling=sampling, on_episode=on_episode):
                played.setdefault(episode.seed, []).append(episode)
        return columns([played[_seed(prompt)].pop(0) for prompt in prompts], trainer.eos_token_ids[0])

    return play


def _seed(prompt: Any) -> int:
    """The seed that a prompt is.

    Raises:
        SettingError: it is none.
    """
    try:
        return int(json.loads(prompt)["seed"])
    except (TypeError, ValueError, KeyError):
        raise SettingError(f"train_dataset: got the prompt {prompt!r:.80}, want those of trl_dataset(seeds).") from None


def _autocast(args: Any) -> Any:
    """What the trainer computes in, where that is not its parameters' type."""
    import torch

    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
