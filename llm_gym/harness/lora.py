"""Low-rank adapters through peft: their kinds, the layers they go into, and the frozen weights beneath them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.layers import decoder_layers, parse_layers
from llm_gym.harness.optimizers import require
from llm_gym.policies.plain import HELD, full_precision

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},  # https://arxiv.org/abs/2106.09685
    "rslora": {"use_rslora": True},  # https://arxiv.org/abs/2312.03732
    "dora": {"use_dora": True},  # https://arxiv.org/abs/2402.09353
}
"""Name -> what peft is told."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (https://arxiv.org/abs/2106.09685), trained instead of the model's own weights."""

    rank: int = 16
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank; for `rslora` by alpha / sqrt(rank)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear`: every one but the head."""
    kind: str = "lora"
    """`lora`; `rslora` (scaled for high ranks); `dora` (the length of each row of the weights is trained apart)."""
    layers: str = ""
    """Decoder layers that get adapters, such as `20-31` or `-4` (the last four); empty: all."""
    base: str = "float32"
    """What the frozen weights are held in: `float32`, `bfloat16`, or `nf4` (QLoRA, https://arxiv.org/abs/2305.14314:
    4 bits and a scale for each block; needs bitsandbytes)."""
    dropout: float = 0.0
    """Must be 0: with dropout, old and new log-probabilities would be of two different functions."""

    def __post_init__(self) -> None:
        for name, valid in (("kind", KINDS), ("base", HELD)):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(f"lora.{name}", getattr(self, name), valid))
        if self.rank < 1:
            raise ConfigError(f"lora.rank: got {self.rank!r}, want a value >= 1.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha: got {self.alpha!r}, want a value > 0.")
        if self.dropout:
            raise ConfigError(
                f"lora.dropout: got {self.dropout!r}, want 0: with dropout, old and new log-probabilities "
                "would be of two different functions."
            )

    @property
    def served_apart(self) -> bool:
        """Whether vLLM can hold the adapter apart from the weights (not DoRA's)."""
        return self.kind != "dora"

    def check(self, layers: int) -> None:
        """Looks at everything that needs no weights.

        Args:
            layers: of the model's decoder.

        Raises:
            ConfigError: a layer that the model lacks, or a package that is not installed.
        """
        if self.layers:
            parse_layers(self.layers, layers, "lora.layers")
        require("bitsandbytes" if self.base == "nf4" else None, f"lora.base: {self.base!r}")


def add_adapters(model: Any, lora: LoraConfig) -> Any:
    """A peft model around the model; the adapters are float32 and change nothing yet.

    Raises:
        ConfigError: no layer has a name that is asked for.
    """
    import peft

    targets: Any = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    numbers = None
    if lora.layers:
        layers = decoder_layers(model)
        numbers, _ = parse_layers(lora.layers, len(layers), "lora.layers")
        if targets == "all-linear":  # peft takes no numbers with it
            found = {name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
            targets = sorted(found)
        elif isinstance(targets, str):
            targets = [targets]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=numbers,
        task_type="CAUSAL_LM",
        **KINDS[lora.kind],
    )
    try:
        made = peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())}") from error
    full_precision(made)
    return made
