"""`llmgym distill`: a student learns from a teacher, on what the student itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llm_gym.cli import train
from llm_gym.cli.nproc import nproc_option
from llm_gym.cli.options import chat_template_option, config_option, env_args_option, envs_option, sets_option


@click.command("distill", short_help="Train a policy towards a teacher, on its own samples.")
@envs_option
@env_args_option
@click.option(
    "--model", metavar="MODEL", help="The student: folder, hub id or run folder; default: the embedded model."
)
@click.option(
    "--teacher", metavar="MODEL", help="Folder, hub id or run folder; or addresses of vLLM servers (http://...)."
)
@click.option("--kl", metavar="KIND", help="full (local teachers), top_k or sampled.  [default: sampled]")
@click.option("--policy", "engine", metavar="ENGINE", help="Engine that samples: transformers, vllm, server or auto.")
@chat_template_option
@config_option
@sets_option
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Decides tasks, sampling and everything random.")
@click.option("--eval-every", type=int, help="Also evaluate after every so many steps.")
@nproc_option
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default: a new one in runs/.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint.")
@click.pass_context
def command(ctx: click.Context, /, teacher: str | None, kl: str | None, sets: tuple[str, ...], **given: Any) -> None:
    """Trains a student to say what the teacher would, where the student's own words have led.

    As `llmgym train`, with the teacher's opinion of every token in place of rewards (which are still reported).
    Both must have the same tokenizer. `llmgym config` prints every setting.
    """
    named = {"distill.teacher": teacher, "distill.kl": kl}
    more = [f"{key}={value}" for key, value in named.items() if value is not None]
    ctx.invoke(train.command, sets=(*more, *sets), taught=True, **given)
