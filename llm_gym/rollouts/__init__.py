"""Episodes played against a policy, none waiting for another's turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.rollouts.driver import Driver, rollout, rollout_async

__all__ = ["Driver", "rollout", "rollout_async"]
__getattr__ = names(
    __name__,
    {
        "driver": (
            "Driver",
            "rollout",
            "rollout_async",
        )
    },
)
