"""The trainer: configuration, gradient, loop.

The names below are imported when they are first used: reading a run folder needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.harness.config import TrainConfig
    from llm_gym.harness.loops.observer import Observer
    from llm_gym.harness.loops.progress import TrainProgress
    from llm_gym.harness.loops.trainer import Trainer
    from llm_gym.harness.settings import load

__all__ = ["Observer", "TrainConfig", "TrainProgress", "Trainer", "load"]
__getattr__ = names(
    __name__,
    {
        "config": ("TrainConfig",),
        "loops.observer": ("Observer",),
        "loops.progress": ("TrainProgress",),
        "loops.trainer": ("Trainer",),
        "settings": ("load",),
    },
)
