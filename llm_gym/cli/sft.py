"""`llmgym sft`: supervised fine-tuning on chats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from llm_gym.cli.group import settings
from llm_gym.cli.nproc import as_rank, launch, nproc_option
from llm_gym.cli.options import chat_template_option, config_option, sets_option, to_resume


@click.command("sft", short_help="Fine-tune a model on chats.")
@click.option("--dataset", "--data", metavar="DATA", help="Chats: a .jsonl, .json, .parquet or .csv file, or a hub id.")
@click.option("--model", metavar="MODEL", help="Folder, hub id or run folder; default: the embedded model.")
@chat_template_option
@config_option
@sets_option
@click.option("--steps", type=int, help="Optimizer steps.")
@nproc_option
@click.option("--out", help="Run folder.  [default: runs/sft]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint.")
def command(
    dataset: str | None,
    model: str | None,
    chat_template: str | None,
    file: str | None,
    sets: tuple[str, ...],
    steps: int | None,
    nproc: int,
    out: str | None,
    resume: bool,
) -> None:
    """Fine-tunes a model on chats: only what the assistant says is trained.

    `llmgym config sft` prints every setting; --set wins over options, options over the --config file.
    A row holds `messages`, or a prompt and a completion (docs/loops.md). The model is written to OUT/model.
    """
    from llm_gym import report
    from llm_gym.harness import load
    from llm_gym.harness.distributed.world import here
    from llm_gym.harness.loops.sft import SFTConfig, sft

    with settings():
        if resume:
            begun = Path(out or "runs/sft")
            to_resume(begun)
            file = file or (str(begun / "config.yaml") if (begun / "config.yaml").is_file() else None)
        given = {"dataset": dataset, "model": model, "chat_template": chat_template, "steps": steps, "out": out}
        config = load(SFTConfig, file, sets, **given)
        folder = config.out or "runs/sft"
    rank, size = here()
    if nproc > size:
        return launch(nproc)
    with as_rank(rank, lambda: f"Stopped. Go on from its newest checkpoint: llmgym sft --resume --out {folder}"):
        sft(replace(config, out=folder), resume=resume, progress=True)
    if rank > 0:
        return
    click.echo(f"Model:  {Path(folder) / 'model'}")
    click.echo(f"Report: {report.write(folder)}")
    click.echo(f"Next:   llmgym eval --model {folder} --env Arithmetic-v0")
