"""`llmgym envs`: the registered environments, and one of them in detail."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import click

from llm_gym.cli.group import settings
from llm_gym.cli.options import env_args_option, parse_args
from llm_gym.errors import SettingError


@click.command("envs", short_help="List the environments, or describe one.")
@click.argument("env", metavar="[ID]", required=False)
@env_args_option
@click.option("--say", default="42", show_default=True, help="The reply given in the example.")
def command(env: str | None, env_args: tuple[str, ...], say: str) -> None:
    """Lists the environments; with an ID, shows its arguments, its spaces and an example.

    An ID of your own is `module:id`: the module is imported, and registers it.
    """
    from llm_gym.envs import NAMESPACE, TABLE
    from llm_gym.envs.adapters.packages import missing
    from llm_gym.envs.installed import FOUND

    given = parse_args(env_args)
    if env is None and given:
        raise SettingError(f"--env-arg: got {env_args[0]!r} without an ID; name the environment it is for.")
    if env is None:
        lines = {name: f"{line}{_needs(missing(name))}" for name, (_, line) in TABLE.items()}
        lines |= {name: f"of the installed package {package}" for name, package in FOUND.items()}
        width = max(map(len, lines))
        for name, line in lines.items():
            click.echo(f"{click.style(f'{name:<{width}}', bold=True)}  {line}")
        click.echo(f"\nShort ids mean {NAMESPACE}/...; `llmgym envs ID` describes one.")
        return
    click.echo("".join(paragraph + "\n\n" for paragraph in describe(env, given, say)), nl=False)


def _needs(line: str) -> str:
    """What is to be installed first, as the end of an environment's line."""
    return f" ({line})" if line else ""


def describe(env_id: str, given: Mapping[str, Any], say: str) -> Iterator[str]:
    """The paragraphs of an environment's description; `given` are its arguments, `say` the example's reply."""
    from llm_gym.envs import resolve
    from llm_gym.envs.parameters import check_text, environment_class, notes, parameters

    full = resolve(env_id)
    cls = environment_class(full)
    check_text(full)
    yield click.style(full, bold=True)
    yield from _prose(cls)
    known, said = parameters(cls), notes(cls)
    width = max(map(len, known), default=0)
    rows = [f"  {name:<{width}}  {_default(p)}  {said.get(name, '')}".rstrip() for name, p in known.items()]
    yield "\n".join(["Arguments (--env-arg NAME=VALUE):", *(_hang(row, width + 4) for row in rows)])
    if unseen := getattr(cls, "eval_args", None):
        yield "Unseen problems: " + ", ".join(f"{k}={v}" for k, v in unseen.items())
    hub = "dataset" in known and isinstance(known["dataset"].default, str)  # such environments ship a sample
    yield from _example(full, {"dataset": "sample", **given} if hub else given, say, wrong=bool(given))


def _prose(cls: type) -> Iterator[str]:
    """The class docstring without its sections."""
    for paragraph in re.split(r"\n\s*\n", inspect.getdoc(cls) or ""):
        if not re.match(r"(Args|Raises|Returns|Attributes):|\s", paragraph):
            yield textwrap.fill(" ".join(paragraph.split()), 100)


def _default(parameter: inspect.Parameter) -> str:
    return "required." if parameter.default is parameter.empty else f"[{parameter.default!r}]"


def _hang(text: str, indent: int) -> str:
    return textwrap.fill(text, 100, subsequent_indent=" " * indent, drop_whitespace=True, replace_whitespace=False)


def _example(env_id: str, args: Mapping[str, Any], say: str, *, wrong: bool) -> Iterator[str]:
    """The spaces and one exchange of the episode with seed 0, or what is missing to show them (an error if `wrong`)."""
    from llm_gym.envs import make

    try:
        with settings():
            env = make(env_id, **args)
    except SettingError as error:
        if wrong:
            raise
        yield f"No example: {error}"
        return
    try:
        _, info = env.reset(seed=0)
        shown = len(info["messages"])
        lines = ["Example (seed 0):", *map(_message, info["messages"])]
        chat = env.get_wrapper_attr("chat")
        _, reward, terminated, truncated, info = env.step(chat.encode_reply(say))
        lines += map(_message, info["messages"][shown:])
        end = f", {info['stop_reason']}" if terminated or truncated else ""
        lines.append(f"  reward {float(reward):g}{end}")
        yield f"Spaces:\n  observation  {env.observation_space}\n  action       {env.action_space}"
        yield "\n".join(lines)
    finally:
        env.close()


def _message(message: Mapping[str, Any]) -> str:
    return textwrap.indent(f"[{message['role']}] {message.get('content') or ''}", "  ")
