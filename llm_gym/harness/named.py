"""A setting that names a function: a row of a table, or an import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llm_gym.errors import ConfigError, unknown


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
