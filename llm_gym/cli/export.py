"""`llmgym export`: a run's model as a folder that other tools load."""

from __future__ import annotations

from pathlib import Path

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import chat_template_option


@click.command("export", short_help="Write a run's model as a folder for transformers, peft or vLLM.")
@click.argument("run", metavar="RUN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--step", type=int, help="The checkpoint; default: the newest.")
@click.option("--adapter/--merge", "adapter", default=False, help="A LoRA run's adapter alone, or folded in (default).")
@click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; default: as the checkpoint has them.")
@chat_template_option
def command(run: str, out: Path, step: int | None, adapter: bool, dtype: str | None, chat_template: str | None) -> None:
    """Writes the model of RUN (a run folder or a checkpoint) to the new folder OUT.

    With it go the tokenizer and its chat template, the ids that end a reply, and a README.md that says how the model
    was made.
    """
    from transformers.utils import logging

    from llm_gym.harness.runs.export import export_run

    logging.disable_progress_bar()
    with settings():
        source = export_run(run, out, step=step, adapter=adapter, dtype=dtype, chat_template=chat_template)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(f"Step {source.step} of {source.run} -> {out} ({size / 1e6:,.1f} MB)")
    env = source.config.get("env")
    if not adapter:
        click.echo(f"Next: llmgym eval --model {out} --env {env or 'Arithmetic-v0'}")
