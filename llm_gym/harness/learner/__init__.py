"""From a batch to a step of the optimizer, in the memory that there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.harness.learner.learner import Learner

__all__ = ["Learner"]
__getattr__ = names(__name__, {"learner": ("Learner",)})
