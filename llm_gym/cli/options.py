"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`k=v` strings as a dict; values are YAML scalars."""
    from llm_gym.harness.config import parse_scalar

    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"got {value!r}, want key=value such as digits_max=3.")
        found[key] = parse_scalar(text)
    return found


def env_options(command: F) -> F:
    """`--env` and `--env-arg`."""
    arg = click.option(
        "--env-arg",
        "env_args",
        metavar="KEY=VALUE",
        multiple=True,
        callback=_pairs,
        help="Keyword argument of the environment; may be repeated. `llmgym envs ID` lists them.",
    )
    env = click.option("--env", metavar="ID", help="Environment; `llmgym envs` lists them, `module:id` imports yours.")
    return env(arg(command))


def config_options(command: F) -> F:
    """`--config` and `--set`."""
    sets = click.option(
        "--set",
        "sets",
        metavar="A.B=C",
        multiple=True,
        help="Any setting of `llmgym config`, by its dotted name; may be repeated.",
    )
    config = click.option("--config", "file", metavar="FILE", help="YAML file of settings.")
    return config(sets(command))


def model_option(command: F) -> F:
    """`--model`."""
    text = "Folder, hub id, run folder or checkpoint; without it, the embedded model."
    return click.option("--model", metavar="MODEL", help=text)(command)
