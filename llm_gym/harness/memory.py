"""Memory: what is kept for backward, which weights are trained, and how many tokens fit (docs/memory.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llm_gym.errors import ConfigError
from llm_gym.harness.activations import thin
from llm_gym.harness.layers import decoder_layers, train_only


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What memory is spent on."""

    checkpointing: int = 0
    """Every so many decoder layers one is computed again in backward instead of kept; 0: none, 1: all."""
    offload: bool = False
    """Whether what is kept for backward waits in CPU memory (only for a model on another device)."""
    train_layers: str = ""
    """The only weights that are trained: layers such as `20-31` or `-4` (the last four), `embeddings`, `head`,
    `norms`, joined by commas; empty: all (or the adapters)."""

    def __post_init__(self) -> None:
        if self.checkpointing < 0:
            raise ConfigError(f"memory.checkpointing: got {self.checkpointing}, want 0 (none), 1 (all layers) or more.")


def economise(model: Any, settings: MemoryConfig, device: torch.device | str) -> None:
    """Applies the settings to a model, in place.

    Raises:
        ConfigError: a setting that this model, or a model on this device, cannot have.
    """
    if settings.offload and torch.device(device).type == "cpu":
        raise ConfigError("memory.offload: the model is on the CPU, so what is kept for backward is there already.")
    if settings.train_layers:
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "memory.train_layers: adapters are trained instead of weights; lora.layers chooses theirs."
            )
        train_only(model, settings.train_layers)
    if settings.checkpointing or settings.offload:
        thin(decoder_layers(model), checkpointing=settings.checkpointing, offload=settings.offload)
