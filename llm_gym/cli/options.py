"""Options that several commands share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from llm_gym.access import HOST, TOKEN
from llm_gym.errors import ConfigError, SettingError, suggestion

F = TypeVar("F", bound=Callable[..., Any])

env_option: Callable[[F], F] = click.option(
    "--env", metavar="ID", help="Environment; `llmgym envs` lists them, `module:id` imports your own."
)
envs_option: Callable[[F], F] = click.option(
    "--env",
    "envs",
    metavar="ID[=WEIGHT]",
    multiple=True,
    help="Environment; `llmgym envs` lists them, `module:id` imports your own. Several: a mixture by weight.",
)
env_args_option: Callable[[F], F] = click.option(
    "--env-arg",
    "env_args",
    metavar="KEY=VALUE",
    multiple=True,
    help="Keyword argument of the environment (a YAML scalar); may be repeated. `llmgym envs ID` lists them.",
)
agent_option: Callable[[F], F] = click.option(
    "--agent", metavar="MODULE:FUNCTION", help="Agent of yours that plays the episodes: solve(task, endpoint)."
)
agent_command_option: Callable[[F], F] = click.option(
    "--agent-command", metavar="COMMAND", help="The same as a program: the task on its input, OPENAI_BASE_URL set."
)
host_option: Callable[[F], F] = click.option(
    "--host", default=HOST, show_default=True, help="Address to listen on; 0.0.0.0: all of them."
)
token_option: Callable[[F], F] = click.option(
    "--token",
    envvar=TOKEN,
    show_envvar=True,
    metavar="SECRET",
    help="What requests must carry; a must where others than this machine reach the server.",
)
engine_options_option: Callable[[F], F] = click.option(
    "--option",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    help="Option of the engine: servers=http://127.0.0.1:8000, base_url=https://api.openai.com/v1; may be repeated.",
)


def port_option(default: int) -> Callable[[F], F]:
    """Where a server listens."""
    kind = click.IntRange(0, 65535)
    return click.option("--port", type=kind, default=default, show_default=True, help="0 takes a free one.")


config_option: Callable[[F], F] = click.option("--config", "file", metavar="FILE", help="YAML file of settings.")
chat_template_option: Callable[[F], F] = click.option(
    "--chat-template",
    metavar="NAME|FILE",
    help="For a model that has none (base models), or over its own: plain, chatml, or a .jinja file.",
)
sets_option: Callable[[F], F] = click.option(
    "--set",
    "sets",
    metavar="A.B=C",
    multiple=True,
    help="Any setting of `llmgym config`, by its dotted name; may be repeated.",
)


def to_resume(out: Path, marks: Sequence[str] = ("config.yaml", "checkpoints")) -> None:
    """Looks whether there is something to go on with: a run that was killed in its first moment has no config yet.

    Raises:
        SettingError: nothing; names the run beside it that was perhaps meant.
    """

    def begun(folder: Path) -> bool:
        return any((folder / mark).exists() for mark in marks)

    if begun(out):
        return
    beside = [folder.name for folder in out.parent.glob("*") if begun(folder)]
    hint = suggestion(out.name, beside, str(out.parent)) or "leave --resume out to begin one there."
    raise SettingError(f"--resume: {str(out)!r} holds no run; {hint}")


def to_write(out: Path, option: str = "--out") -> None:
    """Looks whether the file of an option can be written, before what it is to hold takes hours.

    Raises:
        CheckpointError: it cannot.
    """
    from llm_gym.harness.runs.run_folder import put

    with put(option, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
        if out.exists():
            out.open("ab").close()


def chosen(envs: Sequence[str]) -> dict[str, Any]:
    """`--env`, however often it was given, as settings: one environment, or several with weights.

    Raises:
        ConfigError: a weight that is no number.
    """
    if not envs:
        return {}
    if len(envs) == 1 and "=" not in envs[0]:
        return {"env": envs[0], "envs": ()}  # over a mixture in the file
    entries = []
    for text in envs:
        env, equals, weight = text.partition("=")
        try:
            entries.append({"env": env, "weight": float(weight) if equals else 1.0})
        except ValueError:
            raise ConfigError(f"--env: got {text!r}, want ID=WEIGHT such as GSM8K-v0=2.") from None
    return {"envs": entries}


_EXAMPLES = {
    "--env-arg": "digits_max=3",
    "--option": "servers=http://127.0.0.1:8000",
    "--set": "max_model_len=4096",
}
"""One of each option's arguments."""


def parse_args(env_args: Iterable[str], option: str = "--env-arg") -> dict[str, Any]:
    """Strings given to `option` as keyword arguments.

    Raises:
        ConfigError: a string without `=`.
    """
    found = {}
    for text in env_args:
        from llm_gym.harness.settings import parse_scalar  # takes seconds: torch comes with it

        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"{option}: got {text!r}, want key=value such as {_EXAMPLES[option]}.")
        found[key] = parse_scalar(value)
    return found
