"""Memory: what is kept for backward, which weights are trained, and how many tokens fit (docs/memory.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch

from llm_gym.errors import ConfigError
from llm_gym.harness.bounds import Within
from llm_gym.harness.model.checkpointing import wrap_layers
from llm_gym.harness.model.layers import NAMED, decoder_layers, parse_layers, train_only
from llm_gym.harness.model.lora import LoraConfig
from llm_gym.harness.settings import checked


@checked("memory")
@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """What memory is spent on."""

    checkpointing: Annotated[int, Within("[0, inf)")] = 0
    """Every so many decoder layers one is computed again in backward instead of kept; 0: none, 1: all."""
    offload: bool = False
    """Whether what is kept for backward waits in CPU memory (only for a model on another device)."""
    train_layers: str = ""
    """The only weights that are trained: layers such as `20-31` or `-4` (the last four), `embeddings`, `head`,
    `norms`, joined by commas; empty: all (or the adapters)."""


def check_memory(
    settings: MemoryConfig | None, lora: LoraConfig | None, *, layers: int, device: torch.device | str
) -> None:
    """Looks at everything that needs no weights.

    Args:
        settings: what memory is spent on.
        lora: the adapters, if any.
        layers: of the model's decoder.
        device: where the model will be.

    Raises:
        ConfigError: a setting that this model, or a model on this device, cannot have.
    """
    if lora is not None:
        lora.check(layers)
    if settings is None:
        return
    if settings.offload and torch.device(device).type == "cpu":
        raise ConfigError("memory.offload: the model is on the CPU, so what is kept for backward is there already.")
    if settings.train_layers:
        if lora is not None:
            raise ConfigError("memory.train_layers: with adapters no weight is trained; lora.layers chooses theirs.")
        parse_layers(settings.train_layers, layers, "memory.train_layers", NAMED)


def apply_memory_config(model: Any, settings: MemoryConfig) -> None:
    """Applies the settings to a model, in place; `check_memory` has accepted them."""
    if settings.train_layers:
        train_only(model, settings.train_layers)
    if settings.checkpointing or settings.offload:
        wrap_layers(decoder_layers(model), checkpointing=settings.checkpointing, offload=settings.offload)
