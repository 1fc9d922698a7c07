"""Public names that are imported when they are first used, and modules that have moved."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

HARNESS = {
    "algorithms": {"corrections": "importance_sampling"}
    | {name: name for name in ("advantages", "kl", "losses", "presets", "rewards", "streams")},
    "learner": {"budget": "token_budget", "optimizers": "optimizers"},
    "loops": {"distill": "distill", "replay": "replay", "sft": "sft", "stages": "pipeline", "trainer": "trainer"},
    "model": {"logprobs": "heads", "lora": "lora", "memory": "memory"},
    "runs": {"checkpoint": "run_folder", "metrics": "metrics"},
    "weight_sync": {"sync": "sync"},
}
MOVED = {
    **{
        f"llm_gym.harness.{old}": f"llm_gym.harness.{room}.{new}"
        for room, names in HARNESS.items()
        for old, new in names.items()
    },
    "llm_gym.envs.tools.mcp_server": "llm_gym.envs.tools.mcp.calculator_server",
    "llm_gym.policies.plain": "llm_gym.models.plain",
    "llm_gym.policies.server": "llm_gym.policies.vllm_server.policy",
    "llm_gym.policies.serving": "llm_gym.policies.vllm_server.process",
    "llm_gym.policies.transformers": "llm_gym.policies.builtin.policy",
}
"""Modules that people were shown under another name, until version 0.3: the name -> where they are."""


def names(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports its public names when they are first used.

    Args:
        package: the package's full name.
        homes: a module, relative to it -> the names that are taken from there.

    >>> from llm_gym.harness import load
    >>> load.__module__
    'llm_gym.harness.settings'
    """
    home = {name: module for module, given in homes.items() for name in given}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


class Forwarding(MetaPathFinder, Loader):
    """Gives the modules of `MOVED` under their former names too, with a warning."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where a moved module is; None for all others."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself: nothing of it exists twice."""
        module = importlib.import_module(_now(spec.name))
        self._own = module.__spec__, module.__loader__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run; the import system has put its own notes on it, which are taken off."""
        module.__spec__, module.__loader__ = self._own

    def get_code(self, fullname: str) -> Any:
        """What `python -m` runs."""
        spec = find_spec(_now(fullname))
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]


def _now(name: str) -> str:
    """Where a moved module is, with the warning."""
    warnings.warn(f"{name} is now {MOVED[name]}; the old name goes in version 0.3.", FutureWarning, stacklevel=3)
    return MOVED[name]


def forward_moved() -> None:
    """Installs the forwarding, once."""
    if not any(isinstance(finder, Forwarding) for finder in sys.meta_path):
        sys.meta_path.append(Forwarding())
