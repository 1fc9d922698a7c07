"""`llmgym doctor`: what works on this machine, measured, and what to do about what does not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import config_option, sets_option
from llm_gym.errors import ConfigError, unknown

if TYPE_CHECKING:
    from rich.console import Console

    from llm_gym.harness.doctor import Finding, Setting

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "off": ("OFF", "bold red")}
"""Verdict -> word and colour."""
WIDTH = 110
"""Columns where the report goes to a file."""


@click.command("doctor", short_help="What works on this machine: packages, devices, engines and their parity.")
@click.option("--model", metavar="MODEL", help="Folder, hub id or run folder to measure; default: the embedded model.")
@click.option(
    "--engine", "engines", metavar="NAME", multiple=True, help="Engine to measure; may be repeated. Default: all here."
)
@click.option("--tokens", type=click.IntRange(1), default=1024, show_default=True, help="Tokens compared per engine.")
@config_option
@sets_option
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON.")
def command(
    model: str | None, engines: tuple[str, ...], tokens: int, file: str | None, sets: tuple[str, ...], as_json: bool
) -> None:
    """Looks at packages, devices and engines, and measures whether each engine agrees with the learner.

    Every engine samples tokens, and the learner computes their log-probabilities again: where the two
    differ by more than rounding, training would be off-policy. The settings are those of `llmgym train`,
    so that a run's own model, dtype and engine arguments can be looked at: --config run.yaml.

    The exit code is 1 if anything is off.
    """
    with settings():
        setting = _setting(model, engines, tokens, file, sets)
    found = _checkup(setting)
    off = any(finding.verdict == "off" for finding in found)
    if as_json:
        click.echo(json.dumps({"ok": not off, "findings": [finding.to_dict() for finding in found]}, indent=2))
    else:
        show(found)
    sys.exit(1 if off else 0)


def _setting(model: str | None, engines: Sequence[str], tokens: int, file: str | None, sets: Sequence[str]) -> Setting:
    """What to look at.

    Raises:
        ConfigError: an unknown engine or setting.
    """
    from llm_gym.cli.train import configuration
    from llm_gym.harness.doctor import Setting, at_hand
    from llm_gym.policies import ENGINES

    for engine in engines:
        if engine not in ENGINES:
            raise ConfigError(unknown("--engine", engine, ENGINES))
    config = configuration(file, sets, (), model=model)
    return Setting(config, tuple(engines) or tuple(engine for engine in ENGINES if at_hand(engine, config)), tokens)


def _checkup(setting: Setting) -> list[Finding]:
    """All findings; on a terminal, a line says what is being done."""
    import dataclasses

    from rich.console import Console

    from llm_gym.harness.doctor import checkup

    with _hushed() as error, progress(Console(file=error, highlight=False)) as tell:
        return list(checkup(dataclasses.replace(setting, tell=tell)))


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done: with a spinner on a terminal, one after the other elsewhere."""
    if not console.is_terminal:
        yield lambda text: console.print(f"{text} ...")
        return
    with console.status("looking around ...") as status:
        yield lambda text: status.update(f"{text} ...")


@contextmanager
def _hushed() -> Iterator[IO[str]]:
    """Gives standard error, from which everything else is kept: engines say much while they start.

    LLMGYM_DEBUG=1 lets them.
    """
    if os.environ.get("LLMGYM_DEBUG"):
        yield sys.stderr
        return
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        with os.fdopen(os.dup(kept[1]), "w") as error:
            yield error
    finally:
        for buffered in (sys.stdout, sys.stderr):
            buffered.flush()  # while it still goes nowhere
        for stream, old in zip((1, 2), kept, strict=True):
            os.dup2(old, stream)
            os.close(old)
        os.close(nowhere)


def show(found: Sequence[Finding], console: Console | None = None) -> None:
    """The report: a table of findings, then what is wrong and what to do about it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    section = ""
    for finding in found:
        if section and finding.check != section:
            table.add_row("")
        first = finding.check if finding.check != section else ""
        section = finding.check
        word, colour = MARKS[finding.verdict]
        mark = "" if finding.verdict == "ok" and finding.check != "parity" else word
        table.add_row(Text(first, "bold"), finding.what, finding.found, Text(mark, colour))
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)
    for finding in found:
        if finding.advice:
            word, colour = MARKS[finding.verdict]
            console.print()
            console.print(Text.assemble((f"{word}: ", colour), finding.advice), soft_wrap=True)
