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
from llm_gym.cli.options import env_args_option, env_option, parse_args
from llm_gym.errors import SettingError

if TYPE_CHECKING:
    import gymnasium

    from llm_gym.core import Episode, Sampling

EPISODES = 512
"""Episodes on an environment that has no rows to go through."""


@dataclass(frozen=True)
class Plan:
    """What to play."""

    env: str
    """Full environment id."""
    env_args: dict[str, Any]
    """Its arguments; the tokenizer is the model's."""
    model: str | None
    """Folder or hub id; None: the embedded model."""
    rows: int | None
    """Rows of the environment's data; None: it has none, tasks are drawn by seed."""
    episodes: int
    """How many episodes: the first rows, or as many unseen seeds."""
    sampling: Sampling
    """How completions are drawn."""


@click.command("eval", short_help="Measure a policy: mean reward, with its uncertainty.")
@env_option
@env_args_option
@click.option("--model", metavar="MODEL", help="Run folder, checkpoint, folder or hub id; default: the embedded model.")
@click.option("--engine", default="auto", show_default=True, help="Engine that samples; `openai` is any such endpoint.")
@click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="Option of the engine: servers=http://127.0.0.1:8000, base_url=https://api.openai.com/v1; may be repeated.",
)
@click.option("--episodes", type=click.IntRange(1), help=f"Default: every row of the data, or {EPISODES}.")
@click.option("--greedy/--sampled", "greedy", default=None, help="Likeliest token always (the default), or sampled.")
@click.option("--temperature", type=float, help="Of --sampled; default 1.")
@click.option("--max-tokens", type=click.IntRange(1), help="Most tokens in a completion; default: the environment's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides the sampling.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result here, as JSON.")
def command(
    env: str | None,
    env_args: tuple[str, ...],
    model: str | None,
    engine: str,
    options: tuple[str, ...],
    episodes: int | None,
    greedy: bool | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    out: Path | None,
) -> None:
    """Plays episodes on unseen problems and reports the mean reward with its 95% confidence interval.

    With a run folder as --model, the environment is the run's unless --env says otherwise. An
    environment with data is played once on every row, in order.
    """
    if greedy and temperature:
        raise SettingError(f"--temperature: got {temperature} with --greedy, which has none; pass --sampled.")
    with settings():
        heat = 1.0 if temperature is None else temperature
        greedy = temperature is None if greedy is None else greedy
        plan = make_plan(env, env_args, model, episodes, 0.0 if greedy else heat, max_tokens, text=engine == "openai")
        engine_options = parse_args(options, "--option")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
    found = evaluate(plan, engine, seed, engine_options)
    click.echo("\n".join(shown(plan, found)))
    if out is not None:
        out.write_text(json.dumps(dataclasses.asdict(plan) | {"seed": seed, **found}, indent=2) + "\n", "utf-8")


def make_plan(
    env: str | None,
    env_args: Sequence[str],
    model: str | None,
    episodes: int | None,
    temperature: float,
    max_tokens: int | None,
    *,
    text: bool = False,
) -> Plan:
    """What to play; the environment is made once, so that a bad setting is found before the model loads.

    With `text`, the model is a name that only an endpoint knows: the tokenizer is the embedded one or an argument.

    Raises:
        SettingError: something that cannot work.
    """
    from llm_gym.cli.runs import model_path, run_of
    from llm_gym.core import Sampling
    from llm_gym.envs import make, resolve
    from llm_gym.envs.parameters import environment_class
    from llm_gym.harness import TrainConfig, load

    run, path = run_of(model), model_path(model)
    config = load(TrainConfig, None if run is None else run / "config.yaml")
    env_id = resolve(env or config.env)
    args: dict[str, Any] = {} if env or run is None else dict(config.env_args)
    args |= getattr(environment_class(env_id), "eval_args", {})
    args |= {} if env or run is None else dict(config.eval.env_args)
    args |= parse_args(env_args)
    args = {"tokenizer": None if text else path, **args}
    made = make(env_id, **args)
    rows = getattr(made.unwrapped, "num_tasks", None)
    made.close()
    if rows is not None and episodes is not None and episodes > rows:
        raise SettingError(f"--episodes: got {episodes}, but the data has {rows} rows.")
    most = max_tokens or (config.sampling.max_tokens if run is not None and not env else 1 << 20)
    sampling = Sampling(temperature=temperature, max_tokens=most)
    return Plan(env_id, args, path, rows, episodes or rows or EPISODES, sampling)


def evaluate(plan: Plan, engine: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Plays the plan and sums it up."""
    from transformers.utils import logging

    from llm_gym.cli.progress import counter
    from llm_gym.cli.statistics import summary
    from llm_gym.harness.trainer import EVAL_SEED
    from llm_gym.policies import make_policy
    from llm_gym.policies.model import set_threads
    from llm_gym.policies.transformers import TransformersPolicy
    from llm_gym.rollout import rollout

    logging.disable_progress_bar()
    first = 0 if plan.rows else EVAL_SEED
    with settings():
        policy = make_policy(plan.model, engine=engine, **options)
    if isinstance(policy, TransformersPolicy):
        set_threads(policy.model)
    try:
        with counter("eval", plan.episodes) as count:

            def seen(episode: Episode) -> None:
                count()

            began = time.perf_counter()
            episodes = rollout(
                lambda: environment(plan),
                policy,
                seeds=range(first, first + plan.episodes),
                sampling=plan.sampling,
                seed=seed,
                on_episode=seen,
            )
            return summary(episodes, time.perf_counter() - began)
    finally:
        policy.close()


def environment(plan: Plan) -> gymnasium.Env[Any, Any]:
    """One environment; if it has rows, reset seed i plays row i."""
    import gymnasium

    from llm_gym.envs import make

    env = make(plan.env, **plan.env_args)
    if plan.rows is None:
        return env

    class RowBySeed(gymnasium.Wrapper[Any, Any, Any, Any]):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return self.env.reset(seed=seed, options={"task": seed})

    return RowBySeed(env)


def shown(plan: Plan, found: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    how = f"sampled at temperature {plan.sampling.temperature:g}" if plan.sampling.temperature else "greedy"
    what = f"of {plan.rows:,} rows" if plan.rows else "unseen problems"
    lines = [f"{plan.env}, {plan.model or 'the embedded model'}, {how}, {found['episodes']:,} {what}"]
    if reward := found.get("reward"):
        lines.append(f"reward   {reward['mean']:.4f}")
        if reward["low"] is not None:
            lines[-1] += f"  95% confidence {reward['low']:.4f} to {reward['high']:.4f} ({reward['kind']})"
        lines += [f"  {name:<12} {value:.4f}" for name, value in found["rewards"].items()]
    lines.append("ended    " + ", ".join(f"{name} {count:,}" for name, count in found["stop_reasons"].items()))
    tokens = found["tokens"]
    lines.append(
        f"tokens   {tokens['mean']:.1f} per episode, {tokens['total']:,} in {found['seconds']:.1f} s "
        f"({tokens['per_second']:,.0f} per second)"
    )
    lines += [f"failed   {count} times: {text}" for text, count in found["errors"].items()]
    return lines
