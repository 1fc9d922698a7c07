"""The learner: log-probabilities, backward, clip, step. One device; it is given ready-made batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.batching import Batch, MicroBatch
from llm_gym.harness.logprobs import token_logprobs
from llm_gym.harness.losses import LossConfig, kl_loss, loss
from llm_gym.harness.model import Body


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """How the weights move."""

    name: str = "adamw"
    """`adamw`, or `muon` (hidden matrices by Muon, everything else by AdamW)."""
    lr: float | None = None
    """Peak learning rate of AdamW; None: 1e-6, 1e-5 with LoRA, 2e-4 for the embedded model."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decay of weight matrices; norms, biases, embeddings of one dimension and adapters are never decayed."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this global norm; 0 turns clipping off."""
    schedule: str = "constant"
    """After the warm-up: `constant`, `linear` or `cosine` (both end at 0 after the last step)."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    dtype: str = "float32"
    """Computation: `float32`, or `bfloat16` (autocast; master weights stay as loaded)."""

    def __post_init__(self) -> None:
        for name, valid in (
            ("name", ("adamw", "muon")),
            ("schedule", tuple(SCHEDULES)),
            ("dtype", tuple(_DTYPES)),
        ):
            if getattr(self, name) not in valid:
                raise ConfigError(unknown(f"optimizer.{name}", getattr(self, name), valid))
        for name in ("lr", "muon_lr", "weight_decay", "max_grad_norm", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"optimizer.{name}: got {value!r}, want a value >= 0.")

    @property
    def peak(self) -> float:
        """`lr`, or the careful value where nobody decided."""
        return 1e-6 if self.lr is None else self.lr


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the peak rate at `done` in [0, 1] of the steps."""


def lr_factor(step: int, *, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): warm-up times decay.

    Warm-up rises linearly and reaches 1 at step `warmup - 1`; the decay runs over all `total` steps, from
    1 at step 0, and would reach 0 at step `total`.
    """
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return rise * SCHEDULES[schedule](min(1.0, step / max(1, total)))


class Learner:
    """A model, its optimizer, and the step that joins them.

    The model stays in eval mode: dropout would make old and new log-probabilities two functions.
    """

    def __init__(
        self,
        model: Any,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        total_steps: int = 1,
    ) -> None:
        """Args:
        model: from `load_model`; trained in place.
        optimizer: settings.
        loss: settings.
        total_steps: optimizer steps of the whole run, for the schedule.
        """
        self.model = model.eval()
        self.settings = optimizer or OptimizerConfig()
        self.loss = loss or LossConfig()
        self.total_steps = total_steps
        self.step_count = 0
        self.body = Body(model)
        self.reference: Body | None = self._reference() if self.loss.uses_reference else None
        self.optimizers = _optimizers(model, self.settings)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def logprobs(
        self, batch: MicroBatch, *, temperature: float = 1.0, grad: bool = False, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each trained token, float32 [M] each, at `temperature`."""
        with torch.set_grad_enabled(grad):
            return self._logprobs(self.body, batch.to(self.device), temperature, entropy)

    def step(self, batch: Batch, *, temperature: float = 1.0) -> dict[str, float]:
        """One optimizer step on a whole batch, its micro-batches accumulated; returns its metrics.

        Nothing moves (not even momentum or the schedule's clock stands still: the clock advances) when no
        micro-batch has a gradient.

        Args:
            batch: from `batching.pack`.
            temperature: the sampler's, so that log-probabilities are of the distribution sampled from.
        """
        totals = dict.fromkeys(_MEANS, 0.0)
        peak_gap = 0.0
        for micro in batch.micro:
            value, sums = self._backward(micro.to(self.device), temperature)
            totals["policy/loss"] += value
            peak_gap = max(peak_gap, sums.pop("gap_max", 0.0))
            for key, number in sums.items():
                totals[key] = totals.get(key, 0.0) + number
        seen = sum(len(micro.target) for micro in batch.micro)
        metrics = {k: v if k == "policy/loss" else v / seen if seen else math.nan for k, v in totals.items()}
        metrics["sampler/logprob_gap_max"] = peak_gap
        metrics["policy/grad_norm"] = self._apply(bool(batch.micro))
        metrics["policy/lr"] = self.settings.peak * self._factor(self.step_count - 1)
        metrics["tokens/trained"] = float(batch.tokens)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Optimizer states and the step count; the weights are the model's own."""
        return {"step": self.step_count, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit for bit (load the weights first)."""
        self.step_count = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    # --- inside ---

    def _logprobs(self, body: Body, batch: MicroBatch, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        dtype = _DTYPES[self.settings.dtype]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            hidden = body.hidden(batch).index_select(0, batch.source)
            weight, bias = body.head()
        return token_logprobs(
            hidden, weight, batch.target, bias=bias, temperature=temperature / body.scale, entropy=entropy
        )

    def _backward(self, batch: MicroBatch, temperature: float) -> tuple[float, dict[str, float]]:
        """Adds one micro-batch's gradient; returns its share of the loss and sums over its tokens."""
        config = self.loss
        bonus = config.entropy_weight != 0
        logprobs, entropy = self._logprobs(self.body, batch, temperature, True)
        old = batch.old_logprobs.to(logprobs.dtype)
        per_token, extra = loss(config.name)(logprobs, old, batch.advantages.to(logprobs.dtype), config)
        sums = {}
        if self.reference is not None:
            reference = self._reference_logprobs(batch, temperature)
            per_token = per_token + config.kl_weight * kl_loss(logprobs, old, reference, kind=config.kl)
            sums["policy/kl"] = float(_k3(logprobs.detach(), reference).sum())
        if bonus:
            per_token = per_token - config.entropy_weight * entropy
        value = (batch.weight * per_token).sum()
        value.backward()  # type: ignore[no-untyped-call]
        gap = (logprobs.detach() - old).abs()
        sums |= {f"policy/{_METRIC.get(key, key)}": float(number.sum()) for key, number in extra.items()}
        sums |= {"policy/entropy": float(entropy.detach().sum())}
        sums |= {"sampler/logprob_gap_mean": float(gap.sum()), "gap_max": float(gap.max())}
        return float(value.detach()), sums

    def _reference(self) -> Body:
        """The frozen start: the base under the adapters, or a copy."""
        if hasattr(self.model, "peft_config"):
            return self.body
        return Body(copy.deepcopy(self.model).requires_grad_(False))

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        assert self.reference is not None
        with self.reference.without_adapters():
            return self._logprobs(self.reference, batch, temperature, False)[0]

    def _factor(self, step: int) -> float:
        s = self.settings
        return lr_factor(step, total=self.total_steps, warmup=s.warmup_steps, schedule=s.schedule)

    def _apply(self, any_gradient: bool) -> float:
        """Clips and steps; returns the gradient norm before clipping."""
        factor = self._factor(self.step_count)
        self.step_count += 1
        norm = 0.0
        if any_gradient:
            norm = clip_gradients(self.model.parameters(), self.settings.max_grad_norm)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norm


_MEANS = ("policy/loss", "policy/entropy", "policy/ratio_mean", "policy/clip_fraction", "sampler/logprob_gap_mean")
_METRIC = {"ratio": "ratio_mean", "clipped": "clip_fraction"}


def _k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The reported KL: never negative, whatever the loss uses."""
    log_ratio = reference - logprobs
    return torch.expm1(log_ratio) - log_ratio


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


def _optimizers(model: nn.Module, settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW on what Muon does not take; `peak` in each group is the rate that the schedule scales."""
    groups = parameter_groups(model, settings)
    adamw = [
        {"params": groups[name], "weight_decay": decay, "peak": settings.peak}
        for name, decay in (("decay", settings.weight_decay), ("plain", 0.0))
        if groups[name]
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=settings.peak, betas=settings.betas, eps=settings.eps))
    if groups["muon"]:
        muon = [{"params": groups["muon"], "weight_decay": settings.weight_decay, "peak": settings.muon_lr}]
        optimizers.append(torch.optim.Muon(muon, lr=settings.muon_lr))
    if not optimizers:
        raise ConfigError("optimizer: the model has no trainable parameter.")
    return optimizers
