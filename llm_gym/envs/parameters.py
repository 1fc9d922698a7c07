"""What keyword arguments an environment takes, read from its classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator

from llm_gym.errors import ConfigError, ended, unknown

NUMBERS = {"int": "a whole number", "float": "a number"}
"""Annotations of arguments that no text fits, and what is wanted."""


def environment_class(env_id: str) -> type:
    """The class behind a registered id.

    Raises:
        ConfigError: the id's entry point cannot be imported.
    """
    entry = gymnasium.spec(env_id).entry_point
    try:
        found: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"env: cannot import {entry!r}, the entry point of {env_id!r}: {ended(error)}") from error
    return found if isinstance(found, type) else type(found)


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Keyword arguments by name; those that a class passes on in **kwargs are its parents'."""
    found: dict[str, inspect.Parameter] = {}
    for parent in cls.__mro__[:-1]:
        if "__init__" not in vars(parent):
            continue
        own = [p for p in inspect.signature(parent.__init__).parameters.values() if p.name != "self"]  # type: ignore[misc]
        found |= {p.name: p for p in own if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def notes(cls: type) -> dict[str, str]:
    """What the `Args:` sections of the docstrings say, by argument name; a subclass's word goes first."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?)+)", inspect.cleandoc(vars(parent).get("__doc__") or ""), re.M)
        entries = re.split(r"^ {4}(?=\w+:)", section[1], flags=re.M) if section else []
        for entry in entries:
            name, _, text = entry.partition(":")
            found[name.strip()] = " ".join(text.split())
    return found


def check_text(env_id: str) -> None:
    """Checks that an environment is one of texts.

    Raises:
        ConfigError: it has arguments, and a tokenizer is none of them.
    """
    known = parameters(environment_class(env_id))
    if known and "tokenizer" not in known:
        raise ConfigError(
            f"env: {env_id} takes no tokenizer, so its actions are no token ids; want an environment of texts (a "
            "TextEnv), such as those that `llmgym envs` lists."
        )


def check(env_id: str, given: Mapping[str, Any]) -> None:
    """Checks the names of an environment's arguments before it is made.

    Raises:
        ConfigError: one does not exist (the nearest is named), or a required one is missing.
    """
    known = parameters(environment_class(env_id))
    if "tokenizer" in given:
        check_text(env_id)
    for name in given if known else ():
        if name not in known:
            raise ConfigError(unknown(f"argument of {env_id}", name, known))
    for name, value in given.items() if known else ():
        want = NUMBERS.get(str(known[name].annotation).partition(" |")[0])
        if isinstance(value, str) and want:
            raise ConfigError(f"{name}: got {value!r}, want {want} (argument of {env_id}).")
    given = {**gymnasium.spec(env_id).kwargs, **given}
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise ConfigError(f"{env_id}: needs {' and '.join(missing)}; pass it as --env-arg {missing[0]}=VALUE.")
