"""A setting that names a function: a row of a table, or an import path; one of a user's own is called with care."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_gym.errors import ConfigError, LLMGymError, place, unknown


def by_name(argument: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`, or the object at `package.module:function` if the name has a colon.

    Raises:
        ConfigError: the name is in neither place; the text names `argument` and the nearest valid name.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(unknown(argument, name, table))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{argument}: cannot import {name!r} ({error}).") from error


def import_path(thing: Any) -> str | None:
    """`package.module:name` of a function or class that an import finds there; None of anything else."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    found = getattr(sys.modules.get(str(module)), str(name), None)
    return f"{module}:{name}" if found is thing and found is not None else None


def attempt(argument: str, function: Callable[..., Any], *args: Any, form: str, passing: tuple[Any, ...] = ()) -> Any:
    """What a user's function gives; None where it raised one of `passing`.

    Args:
        argument: the setting that named it.
        function: it.
        args: what it is called with.
        form: how it is called, and what it must give, for the sentence.
        passing: kinds of errors that prove nothing.

    Raises:
        ConfigError: it raised; names file and line.
    """
    try:
        return function(*args)
    except LLMGymError:
        raise
    except Exception as error:
        if isinstance(error, passing):
            return None
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{argument}: {place(function, error)} raised {said}; it is called as {form}.") from error


def want_shape(argument: str, function: Any, value: Any, shape: Sequence[int], words: str) -> None:
    """Looks at the shape of what a function gave.

    Raises:
        ConfigError: another one; names file and line.
    """
    got = getattr(value, "shape", None)
    if got is None or tuple(got) != tuple(shape):
        kind = f"something of shape {tuple(got)}" if got is not None else f"{value!r:.80}"
        raise ConfigError(f"{argument}: {place(function)} gave {kind}, want {words}, here {tuple(shape)}.")


def require(package: str | None, what: str) -> None:
    """One sentence if `what` needs an optional package that is not installed.

    Raises:
        ConfigError: that sentence.
    """
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install {package}")
