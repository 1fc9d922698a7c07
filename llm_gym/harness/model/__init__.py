"""The model that is trained: loading, adapters, attention over packed rows, log-probabilities, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.harness.model.loading import export, load_model

__all__ = ["export", "load_model"]
__getattr__ = names(
    __name__,
    {
        "loading": (
            "export",
            "load_model",
        )
    },
)
