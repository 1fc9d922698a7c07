"""The environments of a run: made once, so that a bad setting is found early; what is played in them, and measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_gym.envs import make, resolve
from llm_gym.errors import ConfigError
from llm_gym.harness.config import TrainConfig
from llm_gym.harness.data.curriculum import CURRICULA, curriculum
from llm_gym.harness.data.mixture import EnvConfig, EnvSpec
from llm_gym.harness.data.selection import Selection
from llm_gym.harness.data.stream import Stream
from llm_gym.harness.data.tasks import Tasks
from llm_gym.harness.distributed.world import World
from llm_gym.harness.evaluation.evaluator import EvalTask, eval_task, eval_tasks, try_env
from llm_gym.harness.loops.trials import try_curriculum


def env_specs(config: TrainConfig) -> list[EnvSpec]:
    """The environments of a run, made once and closed, so that a bad setting is found before a model is loaded.

    Raises:
        SettingError: an environment that cannot be made.
        ConfigError: two of one name, two tokenizers, or a curriculum that has no rows to draw from.
    """
    config.agent.check()
    found = [_arena(config, entry) for entry in entries(config)]
    for name, count in Counter(spec.name for spec in found).items():
        if count > 1:
            raise ConfigError(
                f"envs: {count} are called {name!r}; give each a name of its own in a --config file: "
                f"envs: [{{env: {name}, name: one}}, {{env: {name}, name: other}}]."
            )
    for spec in found[1:]:
        if not _same_tokens(found[0].chat, spec.chat):
            raise ConfigError(f"envs: {spec.name!r} has another tokenizer than {found[0].name!r}; a policy has one.")
    return found


def entries(config: TrainConfig) -> list[EnvConfig]:
    """The run's environments, one or several; each with its arguments, those of the run included."""
    chosen = config.envs or (EnvConfig(config.env),)
    return [replace(entry, env_args={**config.env_args, **entry.env_args}) for entry in chosen]


def selection_of(config: TrainConfig, found: Sequence[EnvSpec], world: World, *, learns: bool) -> Selection | Stream:
    """What the run plays in its environments, and what it trains on.

    Raises:
        ConfigError: an unknown curriculum or filter, or one that cannot work here.
    """
    for i, spec in enumerate(found):
        if spec.curriculum.name not in CURRICULA and spec.rows is not None:
            try_curriculum(spec.curriculum, spec.rows, (config.seed, i))
    tasks = Tasks(
        config.seed,
        [spec.weight for spec in found],
        [curriculum(a.curriculum, a.label, a.rows, (config.seed, i)) for i, a in enumerate(found)],
        [spec.curriculum.pass_reward for spec in found],
    )
    names = [spec.name for spec in found]
    count, how = config.prompts_per_step, (config.filters, config.oversample, names, world)
    if config.stream.max_staleness and learns:
        return Stream(tasks, count, config.stream.max_staleness, config.steps, *how)
    return Selection(tasks, count, *how)


def eval_tasks_of(config: TrainConfig, found: Sequence[EnvSpec]) -> list[EvalTask]:
    """What the run is measured on: its first environment, its others by name, then those of `eval.envs`."""
    tasks = eval_tasks(config.eval, found[0].env_id, found[0].eval_args)
    if not tasks:
        return []
    own = [eval_task(a.env_id, a.eval_args, _eval_name(a)) for a in found[1:]]
    if twice := {one.name for one in own} & {one.name for one in tasks}:
        raise ConfigError(f"eval.envs: {min(twice)!r} is also the name of an environment of the run; give it another.")
    return [replace(task, agent=config.agent) for task in (tasks[0], *own, *tasks[1:])]


def best_metric(found: Sequence[EnvSpec]) -> str:
    """The metric that says which step is best."""
    return "eval/sampled_reward" if len(found) == 1 else "eval/mixture_reward"


def eval_reward(found: Sequence[EnvSpec], row: Mapping[str, float]) -> dict[str, float]:
    """That metric for a mixture: the mean of the environments' sampled rewards, by their weights in training.

    Args:
        found: the run's environments.
        row: what an evaluation measured.
    """
    if len(found) == 1:
        return {}
    rewards = [row["eval/sampled_reward"], *(row[f"eval/{_eval_name(a)}/sampled_reward"] for a in found[1:])]
    weights = [spec.weight for spec in found]
    return {best_metric(found): sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)}


def _arena(config: TrainConfig, entry: EnvConfig) -> EnvSpec:
    """One environment, made for training and for evaluation."""
    env_id = resolve(entry.env)
    if "chat_template" in entry.env_args:
        raise ConfigError(
            "env_args.chat_template: a run has one template, which is saved with its model; set chat_template itself."
        )
    template = {} if config.chat_template is None else {"chat_template": config.chat_template}
    args = {"tokenizer": config.model, **template, **entry.env_args}
    made = make(env_id, **args)
    try_env(made, env_id)
    inner, most = made.unwrapped, config.sampling.max_tokens
    eval_args = args | dict(getattr(inner, "eval_args", {})) | dict(config.eval.env_args)
    spec = EnvSpec(
        entry.name or env_id,
        env_id,
        args,
        eval_args,
        entry.weight,
        entry.curriculum or config.curriculum,
        getattr(inner, "num_tasks", None),
        getattr(inner, "reward_weights", {}),
        min(most, getattr(inner, "max_tokens", most)),
        getattr(inner, "chat", None),
        config.agent,
    )
    made.close()
    return spec


def _eval_name(spec: EnvSpec) -> str:
    """Its name in the metrics of an evaluation, where it is not the first."""
    return re.sub(r"[^\w.-]", "-", spec.label)


def _same_tokens(one: Any, other: Any) -> bool:
    """Whether two chats write the same text as the same ids; an environment without a chat is not asked."""
    if one is None or other is None or one.tokenizer is other.tokenizer:
        return True
    same: bool = one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    return same
