"""The learner: log-probabilities, backward, clip, step. One device; it is given ready-made batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_gym.errors import ConfigError, unknown
from llm_gym.harness.batching import Batch, MicroBatch
from llm_gym.harness.corrections import importance_weights
from llm_gym.harness.kl import k3, kl_loss, kl_to_go
from llm_gym.harness.logprobs import token_logprobs
from llm_gym.harness.losses import LossConfig, loss_function
from llm_gym.harness.model import Body
from llm_gym.harness.streams import Streams


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
MEANS = ("policy/entropy", "policy/ratio_mean", "policy/clip_fraction", "sampler/logprob_gap_mean")
"""Metrics of every step; NaN for a step without a token to compute."""


def lr_factor(step: int, total: int, settings: OptimizerConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based): warm-up times decay.

    The warm-up rises linearly and reaches 1 at step `warmup_steps - 1`. The decay runs over all `total` steps,
    from 1 at step 0 to `floor` at step `total`.
    """
    rise = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    fall = SCHEDULES[settings.schedule](min(1.0, step / max(1, total)))
    return rise * (settings.floor + (1.0 - settings.floor) * fall)


class Learner:
    """A model, its optimizer, and the step that joins them.

    The model stays in eval mode: dropout would make old and new log-probabilities two functions.

    Args:
        model: from `load_model`; trained in place.
        optimizer: how a gradient becomes a step.
        loss: what one token contributes.
        total_steps: optimizer steps of the whole run, for the schedule.

    Raises:
        ConfigError: a setting that cannot work, or a model whose log-probabilities cannot be computed.
    """

    def __init__(
        self,
        model: Any,
        optimizer: OptimizerConfig | None = None,
        loss: LossConfig | None = None,
        *,
        total_steps: int = 1,
    ) -> None:
        self.model = model.eval()
        self.settings, self.loss = optimizer or OptimizerConfig(), loss or LossConfig()
        self.total_steps, self.dtype = total_steps, DTYPES[self.settings.dtype]
        self.loss_fn = loss_function(self.loss.name)
        self.step_count = 0
        self.optimizers = make_optimizers(model, self.settings)
        self.body = Body(model)
        self.reference = self._reference() if self.loss.uses_reference else None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def logprobs(
        self, batch: MicroBatch, *, temperature: float = 1.0, grad: bool = False, entropy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy (nats) of each trained token at `temperature`, float32 [M] each."""
        with torch.set_grad_enabled(grad):
            return self._logprobs(self.body, batch.to(self.device), temperature, entropy)

    def step(self, batch: Batch, *, temperature: float = 1.0) -> dict[str, float]:
        """One optimizer step on a whole batch, its micro-batches accumulated; returns its metrics.

        Means are over the tokens that were computed. The schedule moves on even if no token was (every
        group without spread): it is a step of the run; weights and momenta then stay as they are.

        Args:
            batch: from `batching.pack`.
            temperature: the sampler's: log-probabilities are of the distribution that was sampled from.
        """
        totals = dict.fromkeys(MEANS, 0.0)
        peak_gap = 0.0
        for micro in batch.micro:
            sums = self._backward(micro.to(self.device), temperature)
            peak_gap = max(peak_gap, sums.pop("sampler/logprob_gap_max"))
            totals = {name: totals.get(name, 0.0) + number for name, number in sums.items()}
        loss = totals.pop("policy/loss", 0.0)
        seen = sum(len(micro.target) for micro in batch.micro)
        rate = self._rate()
        norm = self._apply(rate) if batch.micro else 0.0
        self.step_count += 1
        return {
            "policy/loss": loss,
            **{name: total / seen if seen else math.nan for name, total in totals.items()},
            "sampler/logprob_gap_max": peak_gap if seen else math.nan,
            "policy/grad_norm": norm,
            "policy/lr": self.settings.peak * rate,
            "tokens/trained": float(batch.tokens),
        }

    def remember(self, batch: Batch, *, temperature: float = 1.0) -> Batch:
        """The batch with this model's log-probabilities as its proximal ones; before the first of several updates."""
        known = [self.logprobs(m, temperature=temperature, entropy=False)[0].cpu() for m in batch.micro]
        return replace(batch, micro=tuple(replace(m, proximal=p) for m, p in zip(batch.micro, known, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """Optimizer states and the step count; the weights are the model's own."""
        return {"step": self.step_count, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, bit for bit (given the same weights)."""
        self.step_count = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    # Inside

    def _logprobs(self, body: Body, batch: MicroBatch, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            hidden = body.hidden(batch).index_select(0, batch.source)
            weight, bias = body.head()
        return token_logprobs(
            hidden, weight, batch.target, bias=bias, temperature=temperature / body.scale, entropy=entropy
        )

    def _backward(self, batch: MicroBatch, temperature: float) -> dict[str, float]:
        """Adds one micro-batch's gradient; returns its share of the loss, and sums over its tokens."""
        config = self.loss
        new, entropy = self._logprobs(self.body, batch, temperature, True)
        sampler, credit = batch.old_logprobs.to(new.dtype), batch.advantages.to(new.dtype)
        old, correction, streams = self._anchor(batch, new, sampler)
        gap = (new.detach() - sampler).abs()
        streams |= {"policy/entropy": entropy.detach(), "sampler/logprob_gap_mean": gap}
        pull = torch.zeros_like(new)
        if self.reference is not None:
            reference = self._reference_logprobs(batch, temperature)
            streams["policy/kl"] = k3(new.detach(), reference)  # reported so whatever is trained: never negative
            if config.kl_in == "reward":
                credit = credit - config.kl_weight * kl_to_go(new, reference, batch.sequence)
            else:
                pull = config.kl_weight * kl_loss(new, old, reference, kind=config.kl)
        per_token, found = self.loss_fn(Streams(new, old, credit, batch.sequence), config)
        streams |= found
        per_token = correction * (per_token + pull)
        if config.entropy_weight:
            per_token = per_token - config.entropy_weight * entropy
        loss = (batch.weight * per_token).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        sums = {name: float(stream.sum()) for name, stream in streams.items()}
        return {"policy/loss": float(loss.detach()), "sampler/logprob_gap_max": float(gap.max()), **sums}

    def _anchor(self, batch: MicroBatch, new: Tensor, sampler: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the ratio is taken against, each token's importance weight, and their metrics (see `corrections`)."""
        if self.loss.correction.name == "none":
            return sampler, torch.ones_like(new), {}
        proximal = new.detach() if batch.proximal is None else batch.proximal.to(new.dtype)
        return proximal, *importance_weights(proximal, sampler, batch.sequence, self.loss.correction)

    def _reference(self) -> Body:
        """The frozen start: the base model under the adapters, or a copy."""
        if hasattr(self.model, "peft_config"):
            return self.body
        return Body(copy.deepcopy(self.model).requires_grad_(False))

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        assert self.reference is not None
        with self.reference.without_adapters():
            return self._logprobs(self.reference, batch, temperature, False)[0]

    def _rate(self) -> float:
        return lr_factor(self.step_count, self.total_steps, self.settings)

    def _apply(self, rate: float) -> float:
        """Clips, steps and clears; returns the gradient norm before clipping."""
        norm = clip_gradients(self.model.parameters(), self.settings.max_grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm


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
