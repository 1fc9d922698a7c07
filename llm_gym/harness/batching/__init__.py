"""Sequences laid end to end in micro-batches, what they begin with in common once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_gym.lazy import names

if TYPE_CHECKING:
    from llm_gym.harness.batching.packing import pack, samples

__all__ = ["pack", "samples"]
__getattr__ = names(__name__, {"packing": ("pack", "samples")})
