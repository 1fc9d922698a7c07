"""How a gradient becomes a step: optimizers and their parameter groups, the schedule, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_gym.errors import ConfigError, unknown


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """How the weights move."""

    name: str = "adamw"
    """`adamw`, or `muon` (hidden matrices by Muon, everything else by AdamW)."""
    lr: float | None = None
    """Peak learning rate of AdamW; None: the caller's choice for the model (1e-6 where there is none)."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.0
    """Decay of weight matrices; norms, biases and adapters are never decayed."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global L2 norm; 0 turns clipping off."""
    schedule: str = "constant"
    """After the warm-up: `constant`, `linear` or `cosine`."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    floor: float = 0.0
    """Share of the peak at which `linear` and `cosine` end."""
    dtype: str = "float32"
    """Computation: `float32`, or `bfloat16` (autocast; the weights that are trained stay as they are)."""

    def __post_init__(self) -> None:
        for name, valid in (("name", ("adamw", "muon")), ("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(f"optimizer.{name}", getattr(self, name), valid))
        for name in ("lr", "muon_lr", "weight_decay", "max_grad_norm", "warmup_steps", "floor"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"optimizer.{name}: got {value!r}, want a value >= 0.")

    @property
    def peak(self) -> float:
        """`lr`, or the careful value where nobody decided."""
        return 1e-6 if self.lr is None else self.lr


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the peak rate when `done` in [0, 1] of the steps are done."""


def lr_factor(step: int, total: int, settings: OptimizerConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): warm-up times decay.

    The warm-up rises linearly and reaches 1 at step `warmup_steps - 1`. The decay runs over all `total` steps,
    from 1 at step 0 to `floor` at step `total`.
    """
    rise = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    fall = SCHEDULES[settings.schedule](min(1.0, step / max(1, total)))
    return rise * (settings.floor + (1.0 - settings.floor) * fall)


def clip_gradients(parameters: Iterable[nn.Parameter], bound: float) -> float:
    """Scales all gradients down to a global norm of at most `bound` (0: leaves them); returns the norm before.

    Raises:
        FloatingPointError: the norm is not finite, so the step would ruin the weights.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = float(nn.utils.clip_grad_norm_(with_gradient, bound or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(f"learner: the gradient norm is {norm}; the weights were left as they are.")
    return norm


def parameter_groups(model: nn.Module, settings: OptimizerConfig) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters as `muon`, `decay` and `plain` (no decay: one-dimensional, bias, adapters)."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "decay": [], "plain": []}
    ends = {id(p) for module in _ends(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden_matrix = parameter.ndim == 2 and id(parameter) not in ends and "lora_" not in name
        if hidden_matrix and settings.name == "muon":
            groups["muon"].append(parameter)
        elif parameter.ndim >= 2 and "lora_" not in name:
            groups["decay"].append(parameter)
        else:
            groups["plain"].append(parameter)
    return groups


def _ends(model: Any) -> list[nn.Module]:
    """Embedding and head: matrices, but lookups into a vocabulary, which Muon is not meant for."""
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def make_optimizers(model: nn.Module, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW on what Muon does not take; `peak` in each group is the rate that the schedule scales."""
    groups, lr = parameter_groups(model, settings), settings.peak
    adamw = [
        {"params": groups[name], "weight_decay": decay, "peak": lr}
        for name, decay in (("decay", settings.weight_decay), ("plain", 0.0))
        if groups[name]
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=lr, betas=settings.betas, eps=settings.eps))
    if groups["muon"]:
        muon = [{"params": groups["muon"], "weight_decay": settings.weight_decay, "peak": settings.muon_lr}]
        optimizers.append(torch.optim.Muon(muon, lr=settings.muon_lr))
    if not optimizers:
        raise ConfigError("optimizer: the model has no trainable parameter.")
    return optimizers
