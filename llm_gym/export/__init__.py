"""Our environments in other trainers: TRL, Tinker, OpenEnv. A file each; none of them is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.export.openenv import openenv_app
    from llm_gym.export.tinker import tinker_env
    from llm_gym.export.trl_environment import trl_environment, trl_final
    from llm_gym.export.trl_rollout import trl_dataset, trl_reward, trl_rollout_func

__all__ = [
    "openenv_app",
    "tinker_env",
    "trl_dataset",
    "trl_environment",
    "trl_final",
    "trl_reward",
    "trl_rollout_func",
]
__getattr__ = names(
    __name__,
    {
        "openenv": ("openenv_app",),
        "tinker": ("tinker_env",),
        "trl_environment": ("trl_environment", "trl_final"),
        "trl_rollout": ("trl_dataset", "trl_reward", "trl_rollout_func"),
    },
)
