"""Losses: pure functions on flat per-token streams, one value per trained token.

All streams have shape [M] (M trained tokens of any number of sequences). Nothing is averaged here:
the caller sums `weight * loss` with weights fixed by a normaliser (see `batching`) before the first
micro-batch, which is why the gradient does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_gym.errors import ConfigError
from llm_gym.harness.named import by_name


@dataclass(frozen=True, slots=True)
class LossConfig:
    """What is minimised."""

    name: str = "ppo_clip"
    """A row of `LOSSES`, or `package.module:function`."""
    clip_low: float = 0.2
    """The ratio counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high (DAPO: 0.28)."""
    kl: str = "none"
    """`none`, `k1`, `k2` or `k3`: the term that pulls towards the reference model (see `kl_loss`)."""
    kl_weight: float = 0.0
    """Its weight."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus (subtracted from the loss)."""
    normaliser: str = "token_global"
    """`token_global`, `sequence`, `constant`, or `package.module:function` (see `batching`)."""
    constant_length: int = 256
    """Tokens that the `constant` normaliser divides an episode by; Dr. GRPO uses the longest completion allowed."""

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("clip_low", 0 <= self.clip_low <= 1, "in [0, 1]"),
            ("clip_high", self.clip_high >= 0, ">= 0"),
            ("kl_weight", self.kl_weight >= 0, ">= 0"),
            ("constant_length", self.constant_length >= 1, ">= 1"),
        ):
            if not ok:
                raise ConfigError(f"loss.{name}: got {getattr(self, name)!r}, want a value {want}.")
        loss_function(self.name)
        by_name("loss.kl", self.kl, {**KL, "none": None})

    @property
    def uses_reference(self) -> bool:
        """Whether a reference model's log-probabilities are needed."""
        return self.kl != "none" and self.kl_weight > 0

    @property
    def needs_every_sequence(self) -> bool:
        """Whether sequences of zero advantage carry a gradient too (then `pack` must not skip them)."""
        return self.uses_reference or self.entropy_weight != 0


LossFn = Callable[[Tensor, Tensor, Tensor, LossConfig], tuple[Tensor, dict[str, Tensor]]]
"""(logprobs, old_logprobs, advantages, config) -> (loss [M], streams [M] to average by metric name)."""


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs).

    PPO, eq. 7 of https://arxiv.org/abs/1707.06347; separate bounds from DAPO, https://arxiv.org/abs/2503.14476.

    Args:
        logprobs: of the current policy, [M], differentiable.
        old_logprobs: of the distribution that sampled the tokens, [M].
        advantages: [M].
        clip_low: lower clip distance.
        clip_high: upper clip distance.

    Returns:
        The loss [M], and per-token streams [M] that are averaged into metrics: the ratio, and 1 where the
        clip took the gradient away.
    """
    _same_shape(logprobs, old_logprobs, advantages)
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    metrics = {"policy/ratio_mean": ratio.detach(), "policy/clip_fraction": (clipped > plain).detach().to(ratio.dtype)}
    return torch.maximum(plain, clipped), metrics


def sft(logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """-logprobs: cross-entropy of the given tokens, in nats, [M]."""
    _same_shape(logprobs)
    return -logprobs, {}


LOSSES: dict[str, LossFn] = {
    "ppo_clip": lambda new, old, adv, c: ppo_clip(new, old, adv, clip_low=c.clip_low, clip_high=c.clip_high),
    "sft": lambda new, old, adv, c: sft(new),
}


def loss_function(name: str) -> LossFn:
    """The loss of that name in `LOSSES`, or the one at `package.module:function`.

    Raises:
        ConfigError: neither.
    """
    fn: LossFn = by_name("loss.name", name, LOSSES)
    return fn


# Estimators of KL(policy || reference) from one sampled token, http://joschu.net/blog/kl-approx.html.


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference): unbiased value, may be negative, large spread."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference)^2 / 2: slightly biased value, small spread."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy): unbiased value, never negative, small spread."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, *, kind: str) -> Tensor:
    """A per-token term [M] whose value is the estimator `kind`, and whose gradient is the reverse KL's.

    Differentiating an estimator as it stands (as many trainers do) gives, for tokens sampled from the
    policy itself: k1, zero in expectation; k3, the gradient of the FORWARD KL(reference || policy);
    k2, the gradient of the reverse KL, which is the wanted one (https://arxiv.org/abs/2506.09477).

    The reverse KL is E_policy[k1], so its gradient is E[(k1 + c) * grad log policy] for any constant c.
    With off-policy tokens the expectation is reweighted by ratio = policy / sampler:

    - `k1`: ratio * k1, differentiated. Gradient ratio * (k1 + 1) * grad log p, unbiased.
    - `k2`: ratio.detach() * k2, differentiated. Gradient ratio * k1 * grad log p: k1's, less its zero-mean part.
    - `k3`: ratio * k3, differentiated. The ratio is what is missing in GRPO's formula; with it the gradient is
      (ratio * k1 + zero-mean terms) * grad log p, unbiased too.

    All three have the same expected gradient, exactly that of KL(policy || reference) at each state visited.
    """
    _same_shape(logprobs, old_logprobs, ref_logprobs)
    estimate = by_name("loss.kl", kind, KL)(logprobs, ref_logprobs)
    ratio = torch.exp(logprobs - old_logprobs)
    term: Tensor = (ratio.detach() if kind == "k2" else ratio) * estimate
    return term


def _same_shape(*streams: Tensor) -> None:
    shapes = [tuple(s.shape) for s in streams]
    if len(shapes[0]) != 1 or len(set(shapes)) != 1:
        raise ValueError(f"loss: want per-token streams of one shape [M], got {shapes}.")
