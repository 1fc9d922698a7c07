"""`llmgym eval`: the mean reward of a policy, with its uncertainty."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import (
    agent_command_option,
    agent_option,
    chat_template_option,
    engine_options_option,
    env_args_option,
    env_option,
    parse_args,
    to_write,
)
from llm_gym.errors import SettingError, TrainingError

if TYPE_CHECKING:
    from llm_gym.core import Episode, Sampling
    from llm_gym.harness.evaluation.evaluator import EvalTask

EPISODES = 512
"""Problems of an environment that has no rows to go through."""


@dataclass(frozen=True)
class Plan:
    """What to play."""

    eval_task: EvalTask
    """The environment; its tokenizer is the model's."""
    model: str | None
    """Folder or hub id; None: the embedded model."""
    problems: int
    """How many: the first rows, or as many unseen seeds."""
    k: int
    """Completions of each."""
    sampling: Sampling
    """How they are drawn."""
    pass_reward: float
    """Return from which an episode passes, for pass@k."""

    def played_by(self, function: str | None, command: str | None) -> Plan:
        """The same, with an agent in place of the run's own.

        Raises:
            ConfigError: no such agent.
        """
        from llm_gym.harness.data.agents import AgentConfig

        agent = AgentConfig(function, command)
        agent.check()
        return dataclasses.replace(self, eval_task=dataclasses.replace(self.eval_task, agent=agent))

    def to_dict(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        own = {"model": self.model, "k": self.k, "pass_reward": self.pass_reward}
        eval_task = {"env": self.eval_task.env, "env_args": dict(self.eval_task.env_args), "rows": self.eval_task.rows}
        return eval_task | own | {"problems": self.problems, "sampling": dataclasses.asdict(self.sampling)}


@click.command("eval", short_help="Measure a policy: mean reward, with its uncertainty.")
@env_option
@env_args_option
@agent_option
@agent_command_option
@click.option("--model", metavar="MODEL", help="Run folder, checkpoint, folder or hub id; default: the embedded model.")
@chat_template_option
@click.option(
    "--policy",
    "--engine",
    "engine",
    metavar="ENGINE",
    default="auto",
    show_default=True,
    help="Engine that samples; `openai` is any such endpoint.",
)
@engine_options_option
@click.option("--episodes", type=click.IntRange(1), help=f"Problems; default: every row of the data, or {EPISODES}.")
@click.option("-k", "--k", type=click.IntRange(1), help="Sampled completions of each problem: mean@k and pass@k.")
@click.option("--greedy/--sampled", "greedy", default=None, help="Likeliest token always (the default), or sampled.")
@click.option("--temperature", type=float, help="Of --sampled; default 1.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens in a completion; default: the environment's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Decides the sampling.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result here, as JSON.")
def command(
    env: str | None,
    env_args: tuple[str, ...],
    agent: str | None,
    agent_command: str | None,
    model: str | None,
    chat_template: str | None,
    engine: str,
    options: tuple[str, ...],
    episodes: int | None,
    k: int | None,
    greedy: bool | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    out: Path | None,
) -> None:
    """Plays episodes on unseen problems and reports the mean reward with its 95% confidence interval.

    With a run folder as --model, the environment is the run's unless --env says otherwise. An
    environment with data is played on every row, in order. With -k 8, each problem is played 8 times.
    """
    for option, value in (("--temperature", temperature), ("-k", None if k == 1 else k)):
        if greedy and value:
            raise SettingError(f"{option}: got {value} with --greedy, which says the same each time; pass --sampled.")
    with settings():
        heat = 1.0 if temperature is None else temperature
        greedy = temperature is None and k in (None, 1) if greedy is None else greedy
        text = engine == "openai"
        env_args += () if chat_template is None else (f"chat_template={chat_template}",)
        plan = make_plan(env, env_args, model, episodes, 0.0 if greedy else heat, max_tokens, k=k or 1, text=text)
        if agent or agent_command:
            plan = plan.played_by(agent, agent_command)
        engine_options = parse_args(options, "--option")
        if out is not None:
            to_write(out)
    found = evaluate(plan, engine, seed, engine_options)
    click.echo("\n".join(shown(plan, found)))
    if out is not None:
        out.write_text(json.dumps(plan.to_dict() | {"seed": seed, **found}, indent=2) + "\n", "utf-8")
    if "reward" not in found:
        first = next(iter(found["errors"]), "no reason was given")
        raise TrainingError(f"eval: each of the {plan.problems * plan.k:,} episodes failed: {first}")


def make_plan(
    env: str | None,
    env_args: Sequence[str],
    model: str | None,
    episodes: int | None,
    temperature: float,
    max_tokens: int | None,
    *,
    k: int = 1,
    text: bool = False,
) -> Plan:
    """What to play; the environment is made once, so that a bad setting is found before the model loads.

    With `text`, the model is a name that only an endpoint knows: the tokenizer is the embedded one or an argument.

    Raises:
        SettingError: something that cannot work.
    """
    from llm_gym.core import Sampling
    from llm_gym.envs import resolve
    from llm_gym.envs.parameters import environment_class
    from llm_gym.harness import TrainConfig, load
    from llm_gym.harness.evaluation.evaluator import eval_task
    from llm_gym.harness.loops.environments import entries
    from llm_gym.harness.model.loading import config_of
    from llm_gym.harness.runs.lineage import model_path, run_of

    run, path = run_of(model), model_path(model)
    if path is not None and not text:
        config_of(path)
    config = load(TrainConfig, None if run is None else run / "config.yaml")
    first = entries(config)[0]
    env_id = resolve(env or first.env)
    args: dict[str, Any] = {} if env or run is None else dict(first.env_args)
    args |= getattr(environment_class(env_id), "eval_args", {})
    args |= {} if env or run is None else dict(config.eval.env_args)
    args |= parse_args(env_args)
    paper = eval_task(env_id, {"tokenizer": None if text else path, **args})
    paper = dataclasses.replace(paper, agent=config.agent) if run is not None and not env else paper
    if paper.rows is not None and episodes is not None and episodes > paper.rows:
        raise SettingError(f"--episodes: got {episodes}, but the data has {paper.rows} rows.")
    most = max_tokens or (config.sampling.max_tokens if run is not None and not env else 1 << 20)
    problems = episodes or paper.rows or EPISODES
    return Plan(paper, path, problems, k, Sampling(temperature, max_tokens=most), config.eval.pass_reward)


def evaluate(plan: Plan, engine: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plays the plan and sums it up."""
    from transformers.utils import logging

    from llm_gym.harness.evaluation.statistics import summary
    from llm_gym.harness.loops.progress import counter
    from llm_gym.models.loading import set_threads
    from llm_gym.policies import make_policy
    from llm_gym.policies.builtin.policy import TransformersPolicy

    logging.disable_progress_bar()
    with settings():
        policy = make_policy(plan.model, engine=engine, **options)
    if isinstance(policy, TransformersPolicy):
        set_threads(policy.model)
    try:
        with counter("eval", plan.problems * plan.k) as count, plan.eval_task.driver(policy) as driver:

            def seen(episode: Episode) -> None:
                count()

            began = time.perf_counter()
            seeds = plan.eval_task.seeds(plan.problems)
            episodes = driver.run(seeds, group_size=plan.k, seed=seed, sampling=plan.sampling, on_episode=seen)
            return summary(episodes, time.perf_counter() - began, mark=plan.pass_reward)
    finally:
        policy.close()


def shown(plan: Plan, found: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    from llm_gym.harness.evaluation.statistics import different
    from llm_gym.harness.runs.words import drawn

    how = f"sampled at temperature {plan.sampling.temperature:g}" if plan.sampling.temperature else "greedy"
    what = f"of {plan.eval_task.rows:,} rows" if plan.eval_task.rows else drawn(plan.eval_task.env)
    what += f", {plan.k} times each" if plan.k > 1 else ""
    count = f"{plan.problems:,}" if plan.eval_task.rows else different(plan.problems, found.get("problems"))
    lines = [f"{plan.eval_task.env}, {plan.model or 'the embedded model'}, {how}, {count} {what}"]
    if reward := found.get("reward"):
        lines.append(f"reward   {_with_interval(reward)}")
        lines += [f"  {name:<12} {value:.4f}" for name, value in found["rewards"].items()]
    lines += [f"pass@{k:<4}{_with_interval(value)}" for k, value in found.get("pass", {}).items()]
    lines.append("ended    " + ", ".join(f"{name} {count:,}" for name, count in found["stop_reasons"].items()))
    tokens = found["tokens"]
    lines.append(
        f"tokens   {tokens['mean']:.1f} per episode, {tokens['total']:,} in {found['seconds']:.1f} s "
        f"({tokens['per_second']:,.0f} per second)"
    )
    lines += [f"failed   {count} times: {text}" for text, count in found["errors"].items()]
    return lines


def _with_interval(value: Mapping[str, Any]) -> str:
    """A mean and, if it has one, its interval."""
    low, high = value["low"], value["high"]
    interval = "" if low is None else f"  95% confidence {low:.4f} to {high:.4f} ({value['kind']})"
    return f"{value['mean']:.4f}{interval}"
