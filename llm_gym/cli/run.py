"""`llmgym run`: several runs in a row, each from what the one before has made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llm_gym.cli.group import settings
from llm_gym.cli.nproc import as_rank, launch, nproc_option
from llm_gym.cli.options import to_resume

if TYPE_CHECKING:
    from llm_gym.harness.loops.pipeline import Stage
    from llm_gym.harness.loops.progress import TrainProgress


@click.command("run", short_help="Run stages (sft, train, distill) one after the other.")
@click.argument("file", metavar="FILE")
@click.option("--model", metavar="MODEL", help="What the first stage starts from, over that of the file.")
@click.option("--set", "sets", metavar="N.A.B=C", multiple=True, help="A setting of stage N; may be repeated.")
@nproc_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder of all runs; default: runs/<name of the file>.")
@click.option("--resume", is_flag=True, help="Go on in --out where it was stopped.")
def command(file: str, model: str | None, sets: tuple[str, ...], nproc: int, out: Path | None, resume: bool) -> None:
    """Runs the stages of a YAML file, each from the model that the one before has made.

    The file has `stages`, a list such as `- sft: {dataset: chats.jsonl}` and `- train: {env: Arithmetic-v0}`, with
    the settings of `llmgym config sft` and `llmgym config` (docs/loops.md). Every stage is a run folder of its own.
    """
    from llm_gym import report
    from llm_gym.cli.runs import decoder
    from llm_gym.harness.distributed.world import here
    from llm_gym.harness.loops.pipeline import read_plan, run_plan
    from llm_gym.harness.loops.progress import TrainProgress
    from llm_gym.harness.runs.lineage import STAGES

    shown: list[TrainProgress] = []

    def observer(stage: Stage) -> TrainProgress:
        shown.append(TrainProgress())
        return shown[-1]

    def done(stage: Stage, folder: Path) -> None:
        for progress in shown:
            progress.stop()
        click.echo(f"{stage.name}: {report.write(folder, decode=decoder(folder))}")

    with settings():
        plan = read_plan(file, sets, model=model)
        out = out or Path("runs") / Path(file).stem
        if resume:
            to_resume(out, (STAGES,))
    rank, size = here()
    if nproc > size:
        return launch(nproc)
    try:
        with as_rank(rank, lambda: f"Stopped. Go on: {again(file, model, sets, nproc, out)}"):
            found = run_plan(plan, out, resume=resume, observer=observer, done=done)
    finally:
        for progress in shown:
            progress.stop()
    if rank == 0:
        click.echo(f"Model: {found}\nNext:  llmgym export {out} OUT   # for transformers and vLLM")


def again(file: str, model: str | None, sets: Sequence[str], nproc: int, out: Path) -> str:
    """The command that goes on with a run: what was given over the file is not in the file."""
    given = {"--model": [model] if model else [], "--set": sets, "--nproc": [str(nproc)] if nproc > 1 else []}
    options = [word for option, values in given.items() for value in values for word in (option, value)]
    return shlex.join(["llmgym", "run", file, *options, "--resume", "--out", str(out)])
