"""Which package each adapter needs, and the line that installs it."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from types import ModuleType

from llm_gym.errors import FAULTS, ConfigError, described

NEEDS = {
    "Gymnasium-v0": ("minigrid", "minigrid"),
    "ReasoningGym-v0": ("reasoning_gym", "reasoning-gym"),
    "TextArena-v0": ("textarena", "textarena"),
}
"""Environment -> the module that it imports, and the extra that brings it; Gymnasium-v0 needs it for MiniGrid alone."""


def missing(name: str) -> str:
    """The line that installs what an environment lacks here; "" if nothing."""
    module, extra = NEEDS.get(name, ("", ""))
    return f"pip install 'llm-gym[{extra}]'" if module and find_spec(module) is None else ""


def load(name: str) -> ModuleType:
    """The module that an environment needs, imported when one is first made.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    module, extra = NEEDS[name]
    if line := missing(name):
        raise ConfigError(f"env: {name} needs the package {extra}, which is not installed: {line}")
    try:
        return importlib.import_module(module)
    except FAULTS as error:
        raise ConfigError(f"env: {name} cannot import {module!r}: {described(error)}") from error
