"""How a gradient becomes a step: optimizers and their parameter groups, the schedule, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from llm_gym.errors import ConfigError, Diverged, unknown
from llm_gym.harness.bounds import Within
from llm_gym.harness.distributed.fsdp import whole, whole_steps
from llm_gym.harness.registry import require
from llm_gym.harness.settings import checked


@checked("optimizer")
@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """How the weights move."""

    name: str = "adamw"
    """A row of `OPTIMIZERS`: `adamw`, `adamw8bit`, `adafactor` or `muon` (docs/memory.md)."""
    lr: Annotated[float | None, Within("[0, inf)")] = None
    """Peak learning rate; None: chosen by what is trained (`rates`; docs/memory.md), and said when a run starts."""
    muon_lr: Annotated[float | None, Within("[0, inf)")] = None
    """Peak learning rate of Muon's matrices; None: that with which they move as far as AdamW's would at `lr`."""
    betas: Annotated[tuple[float, float], Within("[0, 1)")] = (0.9, 0.999)
    """AdamW's decay rates, in 8 bits as well."""
    eps: Annotated[float, Within("[0, inf)")] = 1e-8
    """AdamW's."""
    weight_decay: Annotated[float, Within("[0, inf)")] = 0.0
    """Decay of weight matrices; norms, biases and adapters are never decayed."""
    max_grad_norm: Annotated[float, Within("[0, inf]")] = 1.0
    """The gradient is scaled down to this global L2 norm; 0 turns clipping off."""
    schedule: str = "constant"
    """After the warm-up: `constant`, `linear` or `cosine`."""
    warmup_steps: Annotated[int, Within("[0, inf)")] = 0
    """Optimizer steps of linear warm-up."""
    floor: Annotated[float, Within("[0, 1]")] = 0.0
    """Share of the peak at which `linear` and `cosine` end."""
    dtype: str = "float32"
    """Computation: `float32`, or `bfloat16` (autocast; the weights that are trained stay as they are)."""

    def __post_init__(self) -> None:
        for name, valid in (("name", OPTIMIZERS), ("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(f"optimizer.{name}", getattr(self, name), valid))

    @property
    def peak(self) -> float:
        """`lr`, or the careful value where nobody decided."""
        return 1e-6 if self.lr is None else self.lr

    @property
    def muon_peak(self) -> float:
        """`muon_lr`, or the careful value where nobody decided."""
        return self.peak if self.muon_lr is None else self.muon_lr


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
        Diverged: the norm is not finite, so the step would ruin the weights.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = float(whole(nn.utils.clip_grad_norm_(with_gradient, bound or math.inf)))
    if not math.isfinite(norm):
        raise Diverged(
            f"learner: the gradient norm is {norm}; the weights were left as they are. Go on from the newest "
            "checkpoint with a smaller optimizer.lr (or max_grad_norm, loss.kl_weight); if it is so from the first "
            "step, look at what the loss and the advantages give."
        )
    return norm


def parameter_groups(model: nn.Module, settings: OptimizerConfig) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters as `hidden` (matrices with an optimizer of their own), `decay` and `plain` (no decay:
    one-dimensional, bias, adapters)."""
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "decay": [], "plain": []}
    apart = OPTIMIZERS[settings.name].hidden is not None
    ends = {id(p) for module in _ends(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ConfigError(
                f"optimizer: {name!r} would be trained in {str(parameter.dtype).removeprefix('torch.')}, where an "
                "update of 1e-6 is lost; load the model in float32, and compute with optimizer.dtype=bfloat16."
            )
        if apart and parameter.ndim == 2 and id(parameter) not in ends and "lora_" not in name:
            groups["hidden"].append(parameter)
        elif parameter.ndim >= 2 and "lora_" not in name:
            groups["decay"].append(parameter)
        else:
            groups["plain"].append(parameter)
    return groups


def _ends(model: Any) -> list[nn.Module]:
    """Embedding and head: matrices, but lookups into a vocabulary, which Muon is not meant for."""
    return [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]


def make_optimizers(model: nn.Module, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The settings' row of `OPTIMIZERS`, made; `peak` in each group is the rate that the schedule scales.

    Raises:
        ConfigError: the model has nothing to train, or its weights are too coarse for small updates.
    """
    groups, row = parameter_groups(model, settings), OPTIMIZERS[settings.name]
    rest = [
        {"params": groups[name], "weight_decay": decay, "peak": settings.peak}
        for name, decay in (("decay", settings.weight_decay), ("plain", 0.0))
        if groups[name]
    ]
    optimizers = [row.make(rest, settings)] if rest else []
    if groups["hidden"] and row.hidden is not None:
        hidden = {"params": groups["hidden"], "weight_decay": settings.weight_decay, "peak": settings.muon_peak}
        optimizers.append(row.hidden([hidden], settings))
    if not optimizers:
        raise ConfigError("optimizer: the model has no trainable parameter.")
    return optimizers


# --- the table --------------------------------------------------------------------------------------------

Groups = list[dict[str, Any]]
Make = Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One way from gradients to weights."""

    make: Make
    """For all parameters, or those that `hidden` leaves."""
    state: float
    """Bytes that it keeps for each element of a large matrix."""
    hidden: Make | None = None
    """For the matrices between embedding and head, if they are treated apart."""
    package: str | None = None
    """What must be installed besides torch."""


def _adamw(groups: Groups, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """https://arxiv.org/abs/1711.05101."""
    return torch.optim.AdamW(groups, lr=settings.peak, betas=settings.betas, eps=settings.eps)


def _adamw8bit(groups: Groups, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of 256 (https://arxiv.org/abs/2110.02861).

    Tensors below 4096 elements keep float32 moments.
    """
    from bitsandbytes.optim import AdamW8bit

    return whole_steps(AdamW8bit)(groups, lr=settings.peak, betas=settings.betas, eps=settings.eps)


def _adafactor(groups: Groups, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Second moments as a row and a column (https://arxiv.org/abs/1804.04235), no first moment.

    torch scales the rate by max(eps2, RMS of the weights). With eps2 = 1 it is the root mean square of an update,
    as AdamW's rate is roughly, so that one rate suits both (only weights of an RMS above 1, some norms, move by more).
    """
    return whole_steps(torch.optim.Adafactor)(groups, lr=settings.peak, eps=(None, 1.0))


def _muon(groups: Groups, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """https://kellerjordan.github.io/posts/muon/."""
    return whole_steps(torch.optim.Muon)(groups, lr=settings.muon_peak)


OPTIMIZERS = {
    "adamw": Optimizer(_adamw, state=8),
    "adamw8bit": Optimizer(_adamw8bit, state=2.04, package="bitsandbytes"),
    "adafactor": Optimizer(_adafactor, state=0.02),
    "muon": Optimizer(_adamw, state=4, hidden=_muon),
}
"""Name -> how it is made, and what it keeps."""


def check_optimizer(settings: OptimizerConfig) -> None:
    """Looks for the package that the optimizer needs, before a model is loaded.

    Raises:
        ConfigError: it is not installed.
    """
    require(OPTIMIZERS[settings.name].package, f"optimizer.name: {settings.name!r}")
