"""vLLM in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.policies.vllm.policy import VLLMPolicy

__all__ = ["VLLMPolicy"]
__getattr__ = names(__name__, {"policy": ("VLLMPolicy",)})
