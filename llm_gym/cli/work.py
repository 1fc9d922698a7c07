"""`llmgym work`: play the episodes of a run that is on another machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import engine_options_option, parse_args
from llm_gym.cli.serve import signals

if TYPE_CHECKING:
    from llm_gym.core import Group


@click.command("work", short_help="Play the episodes of a run on another machine.")
@click.argument("url")
@click.option("--policy", "engine", metavar="ENGINE", help="An engine of this machine; default: the run's, over HTTP.")
@engine_options_option
@click.option("--groups", type=click.IntRange(1), default=8, show_default=True, help="Groups played at once.")
@click.option("--name", help="What the run calls this player; default: host and process.")
def command(url: str, engine: str | None, options: tuple[str, ...], groups: int, name: str | None) -> None:
    """Plays for the run at URL (`llmgym train --set stream.serve=:8900`) until it is over.

    Environments and tools run here; completions come from the run's own engine, or with --policy from an engine of this
    machine, which downloads the weights. The variable LLM_GYM_TOKEN holds the token, if the run asks for one.
    """
    from llm_gym.harness.loops.progress import counter
    from llm_gym.harness.loops.work import work

    with signals(), settings(), counter("groups", None) as count:

        def taken(group: Group) -> None:
            count()

        played = work(
            url,
            engine=engine,
            options=parse_args(options, "--option"),
            groups=groups,
            name=name,
            on_group=taken,
            tell=lambda text: click.echo(text, err=True),
        )
    click.echo(f"The run is over; {played:,} groups were played here.")
