"""A setting that names a function: a row of a table, or an import path; one of a user's own is called with care."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_gym.errors import FAULTS, ConfigError, LLMGymError, described, import_of, place, unknown

Floats = npt.NDArray[np.float64]


def by_name(argument: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`, or the function at `package.module:function` if the name has a colon.

    Raises:
        ConfigError: the name is in neither place, or what is there cannot be called; the text names `argument` and the
            nearest valid name.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(unknown(argument, name, table))
    where = import_of(argument, module, name)
    if not hasattr(where, attribute):
        raise ConfigError(unknown(argument, attribute, [n for n in vars(where) if callable(getattr(where, n))]))
    found = getattr(where, attribute)
    if not callable(found):
        raise ConfigError(f"{argument}: got {name!r}, which is {found!r:.80}, want a function.")
    return found


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
    except FAULTS as error:
        if isinstance(error, passing):
            return None
        said = " ".join(described(error).split())
        raise ConfigError(f"{argument}: {place(function, error)} raised {said}; it is called as {form}.") from error


def want_shape(argument: str, function: Any, value: Any, shape: Sequence[int], words: str, kind: type = object) -> None:
    """Looks at the shape of what a function gave, and at its `kind`.

    Raises:
        ConfigError: another one; names file and line.
    """
    got = getattr(value, "shape", None)
    if got is None or tuple(got) != tuple(shape) or not isinstance(value, kind):
        gave = f"{value!r:.80}" if got is None else f"a {type(value).__name__} of shape {tuple(got)}"
        want = words if kind is object else f"{words} as a {kind.__name__}"
        raise ConfigError(f"{argument}: {place(function)} gave {gave}, want {want}, here {tuple(shape)}.")


def as_numbers(argument: str, function: Any, value: Any, words: str) -> Floats:
    """What a function gave, as float64.

    Raises:
        ConfigError: it is no array of numbers; names file and line.
    """
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, rows of several lengths, a tensor with a gradient
        raise ConfigError(f"{argument}: {place(function)} gave {value!r:.80}, want {words}.") from error


def require(package: str | None, what: str) -> None:
    """One sentence if `what` needs an optional package that is not installed.

    Raises:
        ConfigError: that sentence.
    """
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install {package}")
