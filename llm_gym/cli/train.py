"""`llmgym train`: reinforcement learning in an environment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_gym.cli.group import settings
from llm_gym.cli.nproc import as_rank, launch, nproc_option
from llm_gym.cli.options import (
    agent_command_option,
    agent_option,
    chat_template_option,
    chosen,
    config_option,
    env_args_option,
    envs_option,
    parse_args,
    sets_option,
    to_resume,
)
from llm_gym.errors import SettingError

if TYPE_CHECKING:
    from llm_gym.harness import TrainConfig
    from llm_gym.harness.loops.progress import TrainProgress
    from llm_gym.report.transcripts import Transcript


LINE = 160
"""Characters of a transcript in the terminal."""


@click.command("train", short_help="Train a policy in an environment (GRPO).")
@envs_option
@env_args_option
@agent_option
@agent_command_option
@click.option("--model", metavar="MODEL", help="Folder, hub id or run folder; default: the embedded model.")
@click.option("--policy", "engine", metavar="ENGINE", help="Engine that samples: transformers, vllm, server or auto.")
@click.option(
    "--preset", metavar="NAME", help="Algorithm: grpo, dr_grpo, dapo, gspo, cispo, rloo ... (docs/algorithms.md)."
)
@chat_template_option
@config_option
@sets_option
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Decides tasks, sampling and everything random.")
@click.option("--eval-every", type=int, help="Also evaluate after every so many steps.")
@nproc_option
@click.option("--cluster", type=click.Choice(["ray"]), help="Processes where Ray places them (docs/cluster.md).")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: a new one in runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint.")
@click.option("--rollout-only", is_flag=True, help="Write every step's episodes, and train nothing; see `replay`.")
def command(
    envs: tuple[str, ...],
    env_args: tuple[str, ...],
    agent: str | None,
    agent_command: str | None,
    model: str | None,
    engine: str | None,
    preset: str | None,
    chat_template: str | None,
    file: str | None,
    sets: tuple[str, ...],
    steps: int | None,
    seed: int | None,
    eval_every: int | None,
    nproc: int,
    cluster: str | None,
    out: Path | None,
    resume: bool,
    rollout_only: bool,
    taught: bool = False,
) -> None:
    """Trains a policy in an environment, and writes a run folder with a report.

    Without options: the embedded model, on two-digit addition, on this machine's CPU. `llmgym config`
    prints every setting; --set wins over options, options over the --config file.
    """
    from llm_gym.harness.distributed.world import here
    from llm_gym.harness.loops.distill import NO_TEACHER
    from llm_gym.harness.loops.progress import TrainProgress
    from llm_gym.harness.loops.trainer import Trainer

    if resume:
        file = resumed(out, file, rollout_only=rollout_only)
    named = {"eval.every": eval_every, "policy.engine": engine, "cluster.backend": cluster}
    more = [f"{key}={value}" for key, value in named.items() if value is not None]
    player = {"function": agent, "command": agent_command} if agent or agent_command else None
    fields = {"chat_template": chat_template, "preset": preset, "steps": steps, "seed": seed, "agent": player}
    with settings():
        config = configuration(file, [*more, *sets], env_args, model=model, **chosen(envs), **fields)
    if taught and config.distill is None:
        raise SettingError(NO_TEACHER)
    rank, size = here()
    if nproc > size and config.cluster.backend is None:
        return launch(nproc)
    progress = TrainProgress()
    try:
        with as_rank(rank, lambda: stopped(progress)):
            options: dict[str, Any] = {"out": out, "resume": resume, "learns": not rollout_only}
            with others(config, nproc, options) if nproc > size else nullcontext():
                with settings():
                    trainer = Trainer(config, observer=progress, **options)
                rows = trainer.train(rollout_only=rollout_only)
            if rank == 0:
                click.echo(ending(trainer.run.path, config, rows, rollout_only=rollout_only))
    finally:
        progress.stop()


def resumed(out: Path | None, file: str | None, *, rollout_only: bool) -> str | None:
    """The file of settings of a run that goes on: what was given, else the run's own.

    Raises:
        SettingError: there is nothing to go on with.
    """
    if out is None:
        raise SettingError("--resume: needs --out, the run folder to go on with.")
    if rollout_only:
        raise SettingError("--rollout-only: got it with --resume, but such a run leaves no checkpoint to go on from.")
    to_resume(out)
    return file or (str(out / "config.yaml") if (out / "config.yaml").is_file() else None)


@contextmanager
def others(config: TrainConfig, nproc: int, options: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, the other learner processes are at work on the cluster."""
    from llm_gym.harness.distributed.cluster import check_cluster

    with settings():
        check_cluster(config.cluster)
    from llm_gym.harness.loops.cluster_ranks import ranks

    with ranks(config, nproc, options):
        yield


def configuration(
    file: str | None, sets: Iterable[str], env_args: Sequence[str], *, model: str | None = None, **given: Any
) -> TrainConfig:
    """The run's configuration.

    Raises:
        ConfigError: an unknown key, or a value that cannot be.
    """
    from llm_gym.harness import TrainConfig, load

    parse_args(env_args)
    named = [f"env_args.{text}" for text in env_args]
    return load(TrainConfig, file, [*sets, *named], model=model, **given)


def stopped(progress: TrainProgress) -> str:
    """How to go on after Ctrl-C."""
    progress.stop()
    if progress.run is None:
        return "Stopped before the run began."
    return (
        f"Stopped after step {progress.step} of {progress.steps}.\n"
        f"Go on from its newest checkpoint: llmgym train --resume --out {progress.run}\n"
        f"Look at it so far: llmgym view {progress.run}"
    )


def ending(run: Path, config: TrainConfig, rows: Sequence[Mapping[str, Any]], *, rollout_only: bool) -> str:
    """What is said at the end."""
    if not rollout_only:
        return closing(run, config, rows)
    return f"Episodes: {run / 'episodes'}\nNext:     llmgym replay {run} --step {config.steps}"


def closing(run: Path, config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """What is said at the end: the curve, before and after, where the report is, and what to try next."""
    from llm_gym import report
    from llm_gym.cli.runs import decoder
    from llm_gym.harness.runs.verdict import warnings

    page = report.write(run, decode=decoder(run))
    rewards = [float("nan") if (r := row.get("reward/mean")) is None else float(r) for row in rows if row["step"] > 0]
    parts = [report.terminal_curve(rewards, "Mean training reward by step"), *_before_after(config, rows)]
    parts += [f"Warning: {text}" for text in warnings(rows)]
    parts += _example(run)
    parts.append("\n".join([f"Report: {page}", "Next:", *(f"  {line}" for line in _next(run, config))]))
    return "\n" + "\n\n".join(parts)


def _before_after(config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Greedy and sampled reward in evaluation, first against last."""
    from llm_gym.harness.evaluation.statistics import different
    from llm_gym.harness.runs.words import problems
    from llm_gym.harness.settings import to_dict

    lines = []
    for word in ("greedy", "sampled"):
        seen = [row[name] for row in rows if row.get(name := f"eval/{word}_reward") is not None]
        if len(seen) > 1:
            lines.append(f"  {word:<8} {seen[0]:.3f} -> {seen[-1]:.3f}")
    if not lines:
        return []
    on = problems(to_dict(config))
    hint = "  (for unseen ones: --set eval.env_args.dataset=FILE)" if on == "training problems" else ""
    asked = [int(row["eval/problems"]) for row in rows if row.get("eval/problems") is not None]
    told = different(config.eval.episodes, max(asked, default=None))
    return ["\n".join([f"Reward on {told} {on}:{hint}", *lines])]


def _example(run: Path) -> list[str]:
    """One problem before and after: the first of the report's that went better, else its first."""
    from llm_gym.report.run import read
    from llm_gym.report.transcripts import compare

    comparison = compare(read(run))
    if comparison is None:
        return []
    pairs = comparison.pairs
    pair = next((p for p in pairs if p.after.good > p.before.good), pairs[0])
    question = one_line(m.text for m in pair.before.opening if m.role != "system")
    sides = ((word, _said(t), t.reward) for word, t in (("before", pair.before), ("after", pair.after)))
    return ["\n".join([f"For example: {question}", *(f"  {w:<7} {text}  (reward {r})" for w, text, r in sides)])]


def _said(told: Transcript) -> str:
    """What followed the question: texts, and calls of tools."""
    return one_line(part for m in told.rest for part in (m.text, *m.calls) if part)


def one_line(texts: Iterable[str]) -> str:
    """Texts on one short line; what models wrote must not steer the terminal."""
    line = "".join(c if c.isprintable() else " " for c in " | ".join(texts))
    return line if len(line) <= LINE else f"{line[:LINE]}..."


def _next(run: Path, config: TrainConfig) -> list[str]:
    """Commands worth trying after this run."""
    other = "GuessNumber-v0" if "Arithmetic" not in config.env else "Arithmetic-v0 --env-arg digits_max=3"
    commands = {
        f"llmgym eval --model {run}": "measure it again, with confidence intervals",
        f"llmgym view {run} --open": "look at the report",
        f"llmgym train --env {other}": "something else; `llmgym envs` lists environments",
    }
    width = max(map(len, commands))
    return [f"{line:<{width}}  # {why}" for line, why in commands.items()]
