"""Measuring a policy on problems that training never saw: greedy and sampled, on several environments."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import gymnasium

from llm_gym.core import Episode, Sampling, StopReason
from llm_gym.envs import make, resolve
from llm_gym.envs.asynchronous import reset_async
from llm_gym.envs.parameters import environment_class
from llm_gym.errors import FAULTS, ConfigError, LLMGymError, SettingError, described, place
from llm_gym.harness.bounds import Within
from llm_gym.harness.data.agents import NO_AGENT, AgentConfig
from llm_gym.harness.evaluation.statistics import summary
from llm_gym.harness.settings import checked
from llm_gym.policies import Completer
from llm_gym.rollouts.driver import Driver

EVAL_SEED = 2**32
"""Evaluation seeds start here; training seeds are below, so that no seed is ever both."""
TRIES = 16
"""Episodes that are begun to see whether one can."""
TRANSCRIPTS = 64
"""Greedy episodes of each environment kept in the run folder."""
STOPS = tuple(stop for stop in StopReason if not stop.failed)
"""Ends whose share of the sampled episodes is in the row; the others are `failed`."""
_TAKEN = ("greedy_reward", "sampled_reward", "sampled_stop")

Play = Callable[[Driver, str, Sequence[int], int, Sampling], list[Episode]]
"""(environments, name of the phase, seeds, episodes of each, sampling) -> the episodes, seed-major."""


@checked("eval.envs")
@dataclass(frozen=True)
class EvalEnv:
    """One more environment to evaluate on."""

    env: str | None = None
    """Its id; None: the run's own, with other arguments."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments, over its own `eval_args` (and over the run's, for the run's own environment)."""
    name: str | None = None
    """Its metrics are `eval/<name>/...`; None: the id without namespace."""

    @property
    def title(self) -> str:
        """Its name in metrics."""
        return self.name or (self.env or "").rpartition("/")[2].rpartition(":")[2]


@checked("eval")
@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on unseen problems, always before the first and after the last step."""

    every: Annotated[int, Within("[0, inf)")] = 0
    """Also after every so many steps; 0: only first and last."""
    episodes: Annotated[int, Within("[0, inf)")] = 512
    """Problems, each played once greedily and `k` times sampled: unseen seeds, or the first rows of an environment that
    has rows. 0 switches evaluation off."""
    k: Annotated[int, Within("[1, inf)")] = 1
    """Sampled completions of each problem: the reward is their mean (mean@k), and pass@1 ... pass@k are estimated."""
    temperature: Annotated[float, Within("(0, inf)")] = 1.0
    """Of the sampled completions; greedy ones are always there too."""
    pass_reward: float = 1.0
    """Return from which an episode passes, for pass@k."""
    env_args: Mapping[str, Any] = field(default_factory=dict)
    """Over `env_args` for evaluation (the environment's own `eval_args` come first)."""
    envs: tuple[EvalEnv, ...] = ()
    """Further environments, such as `{env: GSM8K-v0, env_args: {dataset: test.jsonl}, name: gsm8k}`."""

    def __post_init__(self) -> None:
        seen = set[str]()
        for i, title in enumerate(env.title for env in self.envs):
            if not re.fullmatch(r"[\w.-]+", title) or title in _TAKEN or title in seen:
                raise ConfigError(f"eval.envs[{i}].name: got {title!r}, want a name of letters and digits of its own.")
            seen.add(title)


@dataclass(frozen=True)
class EvalTask:
    """An environment to be measured on, and which of its problems."""

    env: str
    """Full id."""
    env_args: Mapping[str, Any]
    name: str = ""
    """Its metrics are `eval/<name>/...`; empty: `eval/...`."""
    rows: int | None = None
    """Rows of its data; None: it has none, problems are drawn by seed."""
    agent: AgentConfig = NO_AGENT
    """Who plays its episodes."""

    def seeds(self, count: int) -> range:
        """Reset seeds of `count` problems, or of every row if there are fewer."""
        return range(EVAL_SEED, EVAL_SEED + (count if self.rows is None else min(count, self.rows)))

    def make(self) -> gymnasium.Env[Any, Any]:
        """One environment; if it has rows, the i-th of `seeds` plays row i."""
        env = make(self.env, **self.env_args)
        return env if self.rows is None else _RowBySeed(env)

    def driver(self, policy: Completer, time_limit: float | None = None) -> Driver:
        """Plays its episodes."""
        return self.agent.driver(self.make, policy, time_limit=time_limit)


def try_env(env: gymnasium.Env[Any, Any], env_id: str) -> None:
    """Looks whether episodes can begin, and a data set's rewards be given, before an engine is up.

    An environment with tools is not asked: to begin may take a server.

    Raises:
        SettingError: none of `TRIES` episodes can; the sentence says why, and where.
    """
    if hasattr(env.unwrapped, "tools"):
        return
    if rehearse := getattr(env.unwrapped, "rehearse", None):
        rehearse()
    first: BaseException | None = None
    for seed in range(TRIES):
        try:
            env.reset(seed=seed)
            return
        except SettingError:
            raise
        except FAULTS as error:
            first = first or error
    assert first is not None
    said = str(first) if isinstance(first, LLMGymError) else described(first)
    where = "" if isinstance(first, LLMGymError) else f" at {place(env.unwrapped.open, first)}"  # type: ignore[attr-defined]
    raise SettingError(f"{said.rstrip('.')}{where}; no episode of {env_id} can begin.")


def eval_task(env: str, env_args: Mapping[str, Any], name: str = "") -> EvalTask:
    """An environment to be measured on, made once and closed: a bad setting is found before a model is loaded.

    Raises:
        SettingError: the environment cannot be made.
    """
    full = resolve(env)
    made = make(full, **env_args)
    try_env(made, full)
    rows = getattr(made.unwrapped, "num_tasks", None)
    made.close()
    return EvalTask(full, dict(env_args), name, rows)


def eval_tasks(config: EvalConfig, env: str, env_args: Mapping[str, Any]) -> list[EvalTask]:
    """The run's own environment first, then `config.envs`; none if evaluation is off.

    Args:
        config: what to evaluate on.
        env: the run's environment.
        env_args: its arguments for evaluation; `tokenizer` and `chat_template` are everybody's.

    Raises:
        SettingError: an environment that cannot be made.
    """
    if not config.episodes:
        return []
    found = [eval_task(env, env_args)]
    for other in config.envs:
        args = dict(env_args)
        if other.env is not None:
            common = {name: env_args[name] for name in ("tokenizer", "chat_template") if name in env_args}
            args = common | dict(getattr(environment_class(resolve(other.env)), "eval_args", {}))
        found.append(eval_task(other.env or env, args | dict(other.env_args), other.title))
    return found


class Evaluation:
    """Measures a policy on every environment to be measured on; environments are kept from one measurement to the next.

    Args:
        eval_tasks: what to measure on.
        policy: what is measured.
        config: how many problems, how often each.
        max_tokens: most tokens in a completion.
        time_limit: seconds an episode may take.
    """

    def __init__(
        self,
        eval_tasks: Sequence[EvalTask],
        policy: Completer,
        config: EvalConfig,
        *,
        max_tokens: int,
        time_limit: float | None = None,
    ) -> None:
        self.config = config
        self.parts = [(e, e.driver(policy, time_limit)) for e in eval_tasks]
        self.ways = (
            ("greedy", 1, Sampling(temperature=0.0, max_tokens=max_tokens)),
            ("sampled", config.k, Sampling(temperature=config.temperature, max_tokens=max_tokens)),
        )

    def __call__(self, play: Play) -> tuple[dict[str, float], dict[str, list[Episode]]]:
        """A row of `eval/...` metrics, and the first greedy episodes by the environment's name."""
        row: dict[str, float] = {}
        transcripts = {}
        for one, driver in self.parts:
            for word, k, sampling in self.ways:
                began = time.perf_counter()
                episodes = play(driver, "eval", one.seeds(self.config.episodes), k, sampling)
                found = summary(episodes, time.perf_counter() - began, mark=self.config.pass_reward)
                row |= metrics(found, f"eval/{one.name}/" if one.name else "eval/", word)
                if word == "greedy":
                    transcripts[one.name] = episodes[:TRANSCRIPTS]
        return row, transcripts

    def close(self) -> None:
        """Closes every environment."""
        for _, driver in self.parts:
            driver.close()


def metrics(found: Mapping[str, Any], prefix: str, word: str) -> dict[str, float]:
    """A summary under the names of metrics, NaN where nobody can say.

    `<prefix><word>_reward` with `..._low` and `..._high` (95% confidence), `..._reward/<component>` if there are
    several; of greedy episodes `<prefix>problems`, how many different ones were asked; of sampled ones
    `<prefix>pass@k` and the share of each end, `<prefix>sampled_stop/<reason>`.
    """
    name, reward = f"{prefix}{word}_reward", found.get("reward", {})
    row = {name: _number(reward.get("mean"))}
    row |= {f"{name}_{end}": _number(reward.get(end)) for end in ("low", "high")}
    parts = found.get("rewards", {})
    row |= {f"{name}/{part}": value for part, value in parts.items() if len(parts) > 1}
    if word == "greedy":
        return row | {f"{prefix}problems": _number(found.get("problems"))}
    row |= {f"{prefix}pass@{k}": value["mean"] for k, value in found.get("pass", {}).items()}
    ends = {str(stop): found["stop_reasons"].get(str(stop), 0) for stop in STOPS} | {"failed": found["failed"]}
    return row | {f"{prefix}sampled_stop/{end}": count / found["episodes"] for end, count in ends.items()}


class _RowBySeed(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Reset seed EVAL_SEED + i plays row i."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Resets to the seed's row."""
        return self.env.reset(seed=seed, options=self._row(seed, options))

    async def reset_async(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """The same, awaited."""
        return await reset_async(self.env, seed=seed, options=self._row(seed, options))

    def _row(self, seed: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
        assert seed is not None
        return {**(options or {}), "task": seed - EVAL_SEED}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
