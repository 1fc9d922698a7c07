"""`llmgym view`: the report of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("view", short_help="Write a run's report.html again, and open it.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--open", "launch", is_flag=True, help="Open it in the browser.")
def command(run: Path, launch: bool) -> None:
    """Writes RUN/report.html from what the run folder holds: a run that goes on, ended or was killed."""
    from llm_gym import report
    from llm_gym.cli.runs import decoder

    path = report.write(run, decode=decoder(run))
    click.echo(path)
    if launch:
        click.launch(str(path))
