"""Losses: pure functions on flat per-token streams, one value per trained token.

All streams have shape [M] (M trained tokens of any number of sequences). Nothing is averaged here:
the caller sums `weight * loss` with weights fixed by a normaliser (see `normalisers`) before the first
micro-batch, which is why the gradient does not depend on how the batch was split.

What is known of a loss is declared where it stands (`token_level`, `by_advantage`); nothing asks for names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Literal

import torch
from torch import Tensor

from llm_gym.errors import ConfigError, place
from llm_gym.harness.algorithms.importance_sampling import CORRECTIONS, CorrectionConfig
from llm_gym.harness.algorithms.kl import KL
from llm_gym.harness.algorithms.normalisers import NORMALISERS
from llm_gym.harness.algorithms.streams import Streams, same_shape, sequence_mean
from llm_gym.harness.bounds import Within
from llm_gym.harness.registry import by_name, want_shape
from llm_gym.harness.settings import checked


@checked("loss")
@dataclass(frozen=True, slots=True)
class LossConfig:
    """What is minimised."""

    name: str = "ppo_clip"
    """A row of `LOSSES`, or `package.module:function`."""
    clip_low: Annotated[float, Within("[0, 1]")] = 0.2
    """The ratio counts down to 1 - clip_low; 1: no bound."""
    clip_high: Annotated[float, Within("[0, inf]")] = 0.2
    """The ratio counts up to 1 + clip_high (DAPO: 0.28)."""
    clip_dual: Annotated[float, Within("(1, inf]")] = 3.0
    """`dual_clip`: the ratio counts up to this where the advantage is negative."""
    tau_positive: Annotated[float, Within("(0, inf)")] = 1.0
    """`sapo`: how fast the gate closes where the advantage is positive."""
    tau_negative: Annotated[float, Within("(0, inf)")] = 1.05
    """`sapo`: how fast it closes where it is negative."""
    kl: str = "none"
    """`none`, `k1`, `k2` or `k3`: the term that pulls towards the reference model (see `kl`)."""
    kl_weight: Annotated[float, Within("[0, inf)")] = 0.0
    """Its weight."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`loss`: each state's own KL. `reward`: a token also answers for the KL of the states it leads to; `k1` only."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus (subtracted from the loss)."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """How tokens are weighted for the mismatch between sampler and learner."""
    normaliser: str = "token_global"
    """`token_global`, `sequence`, `constant`, or `package.module:function` (see `normalisers`)."""
    constant_length: Annotated[int, Within("[1, inf)")] = 256
    """Tokens that the `constant` normaliser divides an episode by; Dr. GRPO uses the longest completion allowed."""

    def __post_init__(self) -> None:
        loss_function(self.name)
        by_name("loss.kl", self.kl, {**KL, "none": None})
        by_name("loss.normaliser", self.normaliser, NORMALISERS)
        if self.kl_in == "reward" and self.kl not in ("none", "k1"):
            raise ConfigError(f"loss.kl: got {self.kl!r} with kl_in='reward', want 'k1'; no other sum is the KL.")

    @property
    def uses_reference(self) -> bool:
        """Whether a reference model's log-probabilities are needed."""
        return self.kl != "none" and self.kl_weight > 0

    @property
    def needs_every_sequence(self) -> bool:
        """Whether sequences of zero advantage may carry a gradient too (then `pack` must not skip them)."""
        nothing_there = getattr(loss_function(self.name), "by_advantage", False)
        return self.uses_reference or self.entropy_weight != 0 or not nothing_there

    @property
    def token_level(self) -> bool:
        """Whether a token's loss depends on that token alone; then it is formed in one pass (`heads.token_loss`)."""
        corrected = self.correction.name != "none"
        known = (not corrected or self.correction.name in CORRECTIONS) and (not self.uses_reference or self.kl in KL)
        whole = (corrected and self.correction.level == "sequence") or (self.uses_reference and self.kl_in == "reward")
        return getattr(loss_function(self.name), "token_level", False) and known and not whole


Metrics = dict[str, Tensor]
"""Streams [M] to average, by metric name."""
LossFn = Callable[[Streams, LossConfig], tuple[Tensor, Metrics]]
"""(streams, config) -> (loss [M], metrics). What a row of `LOSSES` and a user's own loss look like."""


def token_level(fn: LossFn) -> LossFn:
    """Declares that a loss takes each token on its own: what it gives for one depends on no other token.

    It is then called for some tokens of a micro-batch at a time, and its gradient costs 3 matrix products at the
    head instead of 4. A loss that says nothing is given whole micro-batches, which is always right.
    """
    fn.token_level = True  # type: ignore[attr-defined]
    return fn


def by_advantage(fn: LossFn) -> LossFn:
    """Declares that a loss is 0, and has no gradient, where the advantage is 0.

    Sequences without one are then not computed at all. Those of a loss that says nothing are, which is always right.
    """
    fn.by_advantage = True  # type: ignore[attr-defined]
    return fn


def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs).

    PPO, eq. 7 of https://arxiv.org/abs/1707.06347; separate bounds from DAPO, https://arxiv.org/abs/2503.14476.

    Args:
        logprobs: of the current policy, [M], differentiable.
        old_logprobs: of the policy that the ratio is taken against, [M].
        advantages: [M].
        clip_low: lower clip distance.
        clip_high: upper clip distance.

    Returns:
        The loss [M], and per-token streams [M] that are averaged into metrics: the ratio, and 1 where the
        clip took the gradient away.
    """
    same_shape(logprobs, old_logprobs, advantages)
    return _clipped(torch.exp(logprobs - old_logprobs), advantages, clip_low, clip_high)


def dual_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, clip_dual: float
) -> tuple[Tensor, Metrics]:
    """`ppo_clip`, and where A < 0 at most -clip_dual * A: a token that became much likelier cannot blow up the step.

    Dual-clip PPO, https://arxiv.org/abs/1912.09729.
    """
    loss, metrics = ppo_clip(logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)
    bound = -clip_dual * advantages
    held = (advantages < 0) & (loss > bound)
    metrics["policy/clip_fraction"] = metrics["policy/clip_fraction"] + held.to(loss.dtype)
    return torch.where(held, bound, loss), metrics


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """`ppo_clip` with the ratio of the whole sequence: s = exp(mean over its tokens of log ratio).

    GSPO, https://arxiv.org/abs/2507.18071, in its GSPO-token form (section 4.3): every token has the value s and
    the gradient s * grad log p_t. Summed over a sequence of one advantage this is GSPO's gradient; with per-turn
    advantages it is still defined. Use the `sequence` normaliser.

    Args:
        logprobs: [M], differentiable.
        old_logprobs: [M].
        advantages: [M].
        sequence: index of each token's sequence, int64 [M].
        clip_low: lower clip distance of s.
        clip_high: upper clip distance of s.
    """
    same_shape(logprobs, old_logprobs, advantages, sequence)
    whole = sequence_mean((logprobs - old_logprobs).detach(), sequence)
    return _clipped(torch.exp(whole + (logprobs - logprobs.detach())), advantages, clip_low, clip_high)


def gmpo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Metrics]:
    """-A * exp(mean over the sequence of clipped log ratios): the geometric mean of ratios clipped token by token.

    A log ratio counts up to log(1 + clip_high) where A > 0, down to log(1 - clip_low) where A < 0, as in PPO.
    GMPO, https://arxiv.org/abs/2507.20673 (bounds e^-0.4 and e^0.4). Meant for one advantage per sequence.
    """
    same_shape(logprobs, old_logprobs, advantages, sequence)
    low, high = math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)
    plain = logprobs - old_logprobs
    clipped = torch.where(advantages >= 0, plain.clamp(max=high), plain.clamp(min=low))
    metrics = {
        "policy/ratio_mean": torch.exp(plain.detach()),
        "policy/clip_fraction": (clipped != plain).to(plain.dtype),
    }
    return -advantages * torch.exp(sequence_mean(clipped, sequence)), metrics


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Metrics]:
    """-clip(ratio, 1 - clip_low, 1 + clip_high).detach() * A * logprobs: the weight is clipped, no token is lost.

    CISPO, https://arxiv.org/abs/2506.13585 (MiniMax-M1), which sets no lower bound (clip_low = 1).
    """
    same_shape(logprobs, old_logprobs, advantages)
    ratio = torch.exp(logprobs - old_logprobs).detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    metrics = {"policy/ratio_mean": ratio, "policy/clip_fraction": (weight != ratio).to(ratio.dtype)}
    return -weight * advantages * logprobs, metrics


def sapo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, tau_positive: float, tau_negative: float
) -> tuple[Tensor, Metrics]:
    """-A * 4/tau * sigmoid(tau * (ratio - 1)): a soft gate instead of a clip; its slope at ratio 1 is 1.

    SAPO, https://arxiv.org/abs/2511.20347; tau is `tau_positive` where A > 0, else `tau_negative`.
    """
    same_shape(logprobs, old_logprobs, advantages)
    ratio = torch.exp(logprobs - old_logprobs)
    tau = torch.where(advantages > 0, tau_positive, tau_negative).to(ratio.dtype)
    return -advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1)), {"policy/ratio_mean": ratio.detach()}


def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
    """-A * logprobs: the plain policy gradient, for tokens of the current policy (or with a correction).

    Williams 1992, https://doi.org/10.1007/BF00992696.
    """
    same_shape(logprobs, old_logprobs, advantages)
    return -advantages * logprobs, {"policy/ratio_mean": torch.exp(logprobs - old_logprobs).detach()}


def sft(logprobs: Tensor) -> tuple[Tensor, Metrics]:
    """-logprobs: cross-entropy of the given tokens, in nats, [M]."""
    same_shape(logprobs)
    return -logprobs, {}


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Metrics]:
    """The pessimistic one of ratio * A and clipped ratio * A, negated."""
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - low, 1 + high) * advantages
    metrics = {"policy/ratio_mean": ratio.detach(), "policy/clip_fraction": (clipped > plain).detach().to(ratio.dtype)}
    return torch.maximum(plain, clipped), metrics


def _tokens(s: Streams) -> tuple[Tensor, Tensor, Tensor]:
    return s.logprobs, s.old_logprobs, s.advantages


LOSSES: dict[str, LossFn] = {
    "ppo_clip": token_level(
        by_advantage(lambda s, c: ppo_clip(*_tokens(s), clip_low=c.clip_low, clip_high=c.clip_high))
    ),
    "dual_clip": token_level(
        by_advantage(
            lambda s, c: dual_clip(*_tokens(s), clip_low=c.clip_low, clip_high=c.clip_high, clip_dual=c.clip_dual)
        )
    ),
    "gspo": by_advantage(lambda s, c: gspo(*_tokens(s), s.sequence, clip_low=c.clip_low, clip_high=c.clip_high)),
    "gmpo": by_advantage(lambda s, c: gmpo(*_tokens(s), s.sequence, clip_low=c.clip_low, clip_high=c.clip_high)),
    "cispo": token_level(by_advantage(lambda s, c: cispo(*_tokens(s), clip_low=c.clip_low, clip_high=c.clip_high))),
    "sapo": token_level(
        by_advantage(lambda s, c: sapo(*_tokens(s), tau_positive=c.tau_positive, tau_negative=c.tau_negative))
    ),
    "reinforce": token_level(by_advantage(lambda s, c: reinforce(*_tokens(s)))),
    "sft": token_level(lambda s, c: sft(s.logprobs)),
}
"""Those that say `token_level` are formed in one pass, the others in two (see `model.heads`)."""


def loss_function(name: str) -> LossFn:
    """The loss of that name in `LOSSES`, or the one at `package.module:function`.

    Raises:
        ConfigError: neither.
    """
    fn: LossFn = by_name("loss.name", name, LOSSES)
    return fn if name in LOSSES else _shaped(fn)


def _shaped(fn: LossFn) -> LossFn:
    """A user's loss whose shapes are looked at each time: one of another shape would be broadcast, and train."""

    @wraps(fn)
    def checked(streams: Streams, config: LossConfig) -> tuple[Tensor, Metrics]:
        found = fn(streams, config)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
            raise ConfigError(f"loss.name: {place(fn)} gave {type(found).__name__}, want (loss [M], metrics by name).")
        shape = streams.logprobs.shape
        want_shape("loss.name", fn, found[0], shape, "a loss of each token [M]", Tensor)
        for name, stream in found[1].items():
            if not isinstance(name, str):
                raise ConfigError(f"loss.name: {place(fn)} gave a metric called {name!r}, want a text.")
            want_shape(f"loss.name: metric {name!r}", fn, stream, shape, "a value of each token [M]", Tensor)
        return found

    return checked
