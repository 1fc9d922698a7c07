"""The environments of a run: one, or several with weights; each with a driver of its own, all with one policy."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llm_gym.concurrency import run_here
from llm_gym.core import Episode, Group, Sampling, group
from llm_gym.envs import NAMESPACE, make, resolve
from llm_gym.errors import ConfigError
from llm_gym.harness.data.curriculum import CURRICULA, CurriculumConfig, curriculum
from llm_gym.harness.data.filters import Selection
from llm_gym.harness.data.tasks import Task, Tasks
from llm_gym.harness.evaluation.evaluator import Exam, exam, exams, try_env
from llm_gym.harness.loops.trials import try_curriculum
from llm_gym.harness.runs.metrics import describe
from llm_gym.policies import Completer
from llm_gym.rollouts.driver import Driver, OnEpisode

if TYPE_CHECKING:
    from llm_gym.harness.config import TrainConfig


@dataclass(frozen=True)
class EnvConfig:
    """One environment of a mixture."""

    env: str = ""
    """Its id, as in `TrainConfig.env`."""
    weight: float = 1.0
    """How many of a step's groups it gets, in proportion to the other weights."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, over those of the run."""
    name: str | None = None
    """What its episodes and metrics are called; None: its id. Needed where an id occurs twice."""
    curriculum: CurriculumConfig | None = None
    """Which rows of its data are played, and when; None: the run's."""

    def __post_init__(self) -> None:
        if not self.env:
            raise ConfigError("envs: an entry names no environment; want env, and perhaps weight, env_args, name.")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"envs: got weight {self.weight} for {self.env!r}, want a number above 0.")


@dataclass(frozen=True, slots=True)
class Arena:
    """An environment that a run plays, with every decision about it made."""

    name: str
    """What its episodes call it (`Episode.env_id`)."""
    env_id: str
    """Full id."""
    args: Mapping[str, Any]
    """Its arguments in training."""
    eval_args: Mapping[str, Any]
    """Its arguments in evaluation."""
    weight: float
    curriculum: CurriculumConfig
    rows: int | None
    """Rows of its data; None: it draws tasks from seeds."""
    reward_weights: Mapping[str, float]
    limit: int
    """Most tokens in one completion."""
    chat: Any
    """Its chat, None if it has none."""

    @property
    def label(self) -> str:
        """The name in metrics: without our own namespace."""
        return self.name.removeprefix(f"{NAMESPACE}/")


def arenas(config: TrainConfig) -> list[Arena]:
    """The environments of a run, made once and closed, so that a bad setting is found before a model is loaded.

    Raises:
        SettingError: an environment that cannot be made.
        ConfigError: two of one name, two tokenizers, or a curriculum that has no rows to draw from.
    """
    found = [_arena(config, entry) for entry in entries(config)]
    for name, count in Counter(arena.name for arena in found).items():
        if count > 1:
            raise ConfigError(
                f"envs: {count} are called {name!r}; give each a name of its own in a --config file: "
                f"envs: [{{env: {name}, name: one}}, {{env: {name}, name: other}}]."
            )
    for arena in found[1:]:
        if not _same_tokens(found[0].chat, arena.chat):
            raise ConfigError(f"envs: {arena.name!r} has another tokenizer than {found[0].name!r}; a policy has one.")
    return found


def entries(config: TrainConfig) -> list[EnvConfig]:
    """The run's environments, one or several; each with its arguments, those of the run included."""
    chosen = config.envs or (EnvConfig(config.env),)
    return [replace(entry, env_args={**config.env_args, **entry.env_args}) for entry in chosen]


def selection_of(config: TrainConfig, found: Sequence[Arena]) -> Selection:
    """What the run plays in its environments, and what it trains on.

    Raises:
        ConfigError: an unknown curriculum or filter, or one that cannot work here.
    """
    for i, arena in enumerate(found):
        if arena.curriculum.name not in CURRICULA and arena.rows is not None:
            try_curriculum(arena.curriculum, arena.rows, (config.seed, i))
    tasks = Tasks(
        config.seed,
        [arena.weight for arena in found],
        [curriculum(a.curriculum, a.label, a.rows, (config.seed, i)) for i, a in enumerate(found)],
        [arena.curriculum.pass_reward for arena in found],
    )
    names = [arena.name for arena in found]
    return Selection(tasks, config.prompts_per_step, config.filters, config.oversample, names)


def exams_of(config: TrainConfig, found: Sequence[Arena]) -> list[Exam]:
    """What the run is measured on: its first environment, its others by name, then those of `eval.envs`."""
    papers = exams(config.eval, found[0].env_id, found[0].eval_args)
    if not papers:
        return []
    own = [exam(a.env_id, a.eval_args, _exam_name(a)) for a in found[1:]]
    if twice := {one.name for one in own} & {one.name for one in papers}:
        raise ConfigError(f"eval.envs: {min(twice)!r} is also the name of an environment of the run; give it another.")
    return [papers[0], *own, *papers[1:]]


def best_metric(found: Sequence[Arena]) -> str:
    """The metric that says which step is best."""
    return "eval/sampled_reward" if len(found) == 1 else "eval/mixture_reward"


def eval_reward(found: Sequence[Arena], row: Mapping[str, float]) -> dict[str, float]:
    """That metric for a mixture: the mean of the environments' sampled rewards, by their weights in training.

    Args:
        found: the run's environments.
        row: what an evaluation measured.
    """
    if len(found) == 1:
        return {}
    rewards = [row["eval/sampled_reward"], *(row[f"eval/{_exam_name(a)}/sampled_reward"] for a in found[1:])]
    weights = [arena.weight for arena in found]
    return {best_metric(found): sum(w * r for w, r in zip(weights, rewards, strict=True)) / sum(weights)}


def scoring(found: Sequence[Arena], groups: Sequence[Group]) -> dict[str, Any]:
    """What `rewards_of` needs of the environment of each group."""
    by_name = {arena.name: arena for arena in found}
    of_group = [by_name[group.episodes[0].env_id] for group in groups]
    return {"weights": [arena.reward_weights for arena in of_group], "limit": [arena.limit for arena in of_group]}


def describe_each(found: Sequence[Arena], episodes: Sequence[Episode]) -> dict[str, float]:
    """The metrics of each environment of a mixture, such as `reward/mean/GSM8K-v0`; nothing if there is one."""
    if len(found) == 1:
        return {}
    row: dict[str, float] = {}
    for arena in found:
        own = [episode for episode in episodes if episode.env_id == arena.name]
        told = describe(own) if own else {}
        row |= {f"{name}/{arena.label}": told[name] for name in EACH if name in told}
        row[f"groups/share/{arena.label}"] = len(own) / len(episodes) if episodes else 0.0
    return row


EACH = ("reward/mean", "reward/std", "episode/tokens_mean", "episode/truncated_fraction", "episode/failed_fraction")
"""Metrics that a mixture has for each environment."""


class Drivers:
    """A driver for every environment, all playing at once against one policy."""

    def __init__(self, found: Sequence[Arena], policy: Completer, *, time_limit: float | None = None) -> None:
        self._drivers = [
            Driver(arena.env_id, policy, env_args=arena.args, time_limit=time_limit, name=arena.name) for arena in found
        ]

    def play(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        seed: int,
        sampling: Sampling,
        on_episode: OnEpisode | None = None,
    ) -> list[Group]:
        """A group of `group_size` episodes for every task, in the order of tasks."""
        options = {"group_size": group_size, "seed": seed, "sampling": sampling, "on_episode": on_episode}
        return run_here(self._play(tasks, group_size, options))

    async def _play(self, tasks: Sequence[Task], group_size: int, options: Mapping[str, Any]) -> list[Group]:
        places: dict[int, list[int]] = {}
        for place, task in enumerate(tasks):
            places.setdefault(task.env, []).append(place)
        running = []
        try:
            async with asyncio.TaskGroup() as players:
                for env, own in places.items():
                    seeds, rows = [tasks[i].seed for i in own], [tasks[i].row for i in own]
                    play = self._drivers[env].run_async(seeds, rows=rows, **options)
                    running.append((own, players.create_task(play)))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        groups: list[Group | None] = [None] * len(tasks)
        for own, player in running:
            for place, made in zip(own, group(player.result(), group_size), strict=True):
                groups[place] = made
        return [made for made in groups if made is not None]

    def close(self) -> None:
        """Closes every environment."""
        for driver in self._drivers:
            driver.close()


def _arena(config: TrainConfig, entry: EnvConfig) -> Arena:
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
    arena = Arena(
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
    )
    made.close()
    return arena


def _exam_name(arena: Arena) -> str:
    """Its name in the metrics of an evaluation, where it is not the first."""
    return re.sub(r"[^\w.-]", "-", arena.label)


def _same_tokens(one: Any, other: Any) -> bool:
    """Whether two chats write the same text as the same ids; an environment without a chat is not asked."""
    if one is None or other is None or one.tokenizer is other.tokenizer:
        return True
    same: bool = one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    return same
