"""`llmgym config`: every setting, its default and what it means, as YAML."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
import typing
from itertools import pairwise
from typing import Any, Literal

import click

CONFIGS = {
    "train": "llm_gym.harness.config:TrainConfig",
    "distill": "llm_gym.harness.config:TrainConfig",
    "sft": "llm_gym.harness.loops.sft:SFTConfig",
}


@click.command("config", short_help="A commented YAML file with every default.")
@click.argument("name", type=click.Choice(list(CONFIGS)), default="train")
def command(name: str) -> None:
    """Prints the settings of `llmgym train` (and `distill`), or `sft`, with their defaults, as commented YAML.

    Keep what you change: `llmgym config > run.yaml`, then `llmgym train --config run.yaml`.
    """
    module, _, attribute = CONFIGS[name].partition(":")
    click.echo(commented(getattr(importlib.import_module(module), attribute)()), nl=False)


def commented(config: Any) -> str:
    """A configuration as YAML; above each key stands the docstring of its field."""
    import yaml

    from llm_gym.harness.settings import to_dict

    plain, notes, hints = to_dict(config), field_notes(type(config)), typing.get_type_hints(type(config))
    lines = []
    for field in dataclasses.fields(config):
        value, note = getattr(config, field.name), notes.get(field.name, "")
        if dataclasses.is_dataclass(value):
            note = note or inspect.getdoc(type(value)) or ""
            body = f"{field.name}:\n{textwrap.indent(commented(value), '  ')}"
        else:
            style = None if plain[field.name] and isinstance(plain[field.name], list | dict) else False
            body = yaml.safe_dump({field.name: plain[field.name]}, default_flow_style=style, allow_unicode=True)
        for option in typing.get_args(hints[field.name]) if value is None else ():
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                body += textwrap.indent(commented(option()), "#   ")
        if typing.get_origin(hints[field.name]) is Literal:
            note = f"{' | '.join(map(str, typing.get_args(hints[field.name])))}. {note}"
        comment = "".join(f"# {line}\n" for line in textwrap.wrap(note, 100))
        lines.append(comment + body)
    return "".join(lines)


def field_notes(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, by field name, white space folded."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    notes = {}
    for field, note in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(note, ast.Expr):
            text = ast.literal_eval(note.value) if isinstance(note.value, ast.Constant) else ""
            notes[field.target.id] = " ".join(str(text).split())
    return notes
