"""The trainer: configuration, gradient, loop.

The names below are imported when they are first used: reading a run folder needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_gym.harness.config import TrainConfig
    from llm_gym.harness.loops.trainer import Observer, Trainer
    from llm_gym.harness.settings import load

__all__ = ["Observer", "TrainConfig", "Trainer", "load"]
_HOME = {"Observer": "loops.trainer", "TrainConfig": "config", "Trainer": "loops.trainer", "load": "settings"}


def __getattr__(name: str) -> Any:
    """Imports a public name."""
    if name not in _HOME:
        raise AttributeError(f"module 'llm_gym.harness' has no attribute {name!r}")
    return getattr(importlib.import_module(f"llm_gym.harness.{_HOME[name]}"), name)
